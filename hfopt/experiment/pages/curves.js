"use strict";
// The curves of the runs that are shown, one panel a quantity, all with one cursor.
hfopt.curves = { charts: [], axis: "step" };

hfopt.quantities = function (runs) {
  const metrics = new Map();
  for (const run of runs) for (const metric of run.metrics) if (!metrics.has(metric.title)) metrics.set(metric.title, metric);
  const logs = (title) => runs.every((run) => run.metrics.every((metric) => metric.title !== title || metric.log));
  return [
    { title: "loss", log: true, parts: [["train_loss", "training", true], ["test_loss", "test", false]] },
    ...[...metrics.values()].map((m) => ({ title: m.title, log: logs(m.title), parts: [[m.column, "test", false]], factor: m.factor, metric: m.title })),
    { title: "λ (damping)", log: true, parts: [["damping", "λ", false]] },
    { title: "ρ (change of the loss over the predicted change)", log: false, parts: [["rho", "ρ", false]], central: true },
    { title: "CG iterations", log: false, parts: [["cg_iterations", "all", true], ["backtracked", "taken", false]] },
  ];
};

hfopt.drawCurves = function () {
  const runs = hfopt.shown.map((id) => hfopt.runs.get(id)).filter(Boolean);
  const place = document.getElementById("panels");
  const wanted = [];
  for (const quantity of hfopt.quantities(runs)) {
    const tables = [];
    runs.forEach((run) => {
      if (quantity.metric && !run.metrics.some((m) => m.title === quantity.metric)) return;
      quantity.parts.forEach(([column, label, dashed], part) => {
        const values = run.columns[column];
        if (!values || !values.some((value) => Number.isFinite(value))) return;
        const alone = runs.length === 1, several = quantity.parts.length > 1;
        const colour = hfopt.colour(alone ? (several ? part : hfopt.place(run.id)) : hfopt.place(run.id));
        const name = alone ? label : `${run.id}${several ? ` ${label}` : ""}`;
        const y = quantity.factor && quantity.factor !== 1 ? Float64Array.from(values, (value) => value * quantity.factor) : values;
        tables.push({ x: run.columns[hfopt.curves.axis], y, label: name, colour, dashed: several && dashed && !alone });
      });
    });
    if (tables.length) wanted.push([quantity, tables]);
  }
  // One horizontal axis for all panels, though some runs have no curves in some.
  const ends = runs.map((run) => run.columns[hfopt.curves.axis]).filter((x) => x && x.length).flatMap((x) => [x[0], x[x.length - 1]]).filter(Number.isFinite);
  const extent = ends.length ? hfopt.wide(Math.min(...ends), Math.max(...ends)) : undefined;
  const units = { step: "step", seconds: "seconds", products: "curvature products" };
  const key = JSON.stringify([hfopt.curves.axis, hfopt.dark(), wanted.map(([q, tables]) => [q.title, q.log, tables.map((t) => [t.label, t.colour])])]);
  if (key === hfopt.curves.key) wanted.forEach(([quantity, tables], i) => hfopt.update(hfopt.curves.charts[i], tables, { extent, ...hfopt.limits(quantity, tables) }));
  else {
    hfopt.curves.charts.forEach(hfopt.forget);
    place.replaceChildren();
    hfopt.curves.charts = wanted.map(([quantity, tables]) =>
      hfopt.chart(place, tables, { title: quantity.title, log: quantity.log, sync: "curves", xLabel: units[hfopt.curves.axis], onStep: hfopt.goToX, extent, ...hfopt.limits(quantity, tables) }),
    );
    hfopt.curves.key = key;
  }
  const thinned = runs.filter((run) => run.columns.step && run.columns.step.length < run.of);
  document.getElementById("curves-note").textContent = thinned
    .map((run) => `${run.id}: ${run.columns.step.length} of ${run.of} rows are drawn`).join("; ");
};

// A few extreme ratios would flatten all others.
hfopt.limits = function (quantity, tables) {
  if (!quantity.central) return {};
  const all = tables.flatMap((table) => Array.from(table.y).filter(Number.isFinite)).sort((a, b) => a - b);
  const at = (share) => all[Math.min(all.length - 1, Math.floor(share * all.length))];
  const low = Math.max(Math.min(at(0.03), 0), -1) - 0.1, high = Math.min(Math.max(at(0.97), 1), 2) + 0.1;
  return { range: [low, high] };
};
