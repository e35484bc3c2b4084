"use strict";
// One step of one run: its numbers, what was recorded at it, and its table of conjugate gradients.
hfopt.step = { id: null, charts: [], follow: true };

hfopt.TITLES = {
  train_loss: "training loss", test_loss: "test loss", damping: "λ", rho: "ρ", cg_iterations: "CG iterations", backtracked: "iterate taken",
  step_length: "step length", gradient_norm: "gradient norm", seconds: "seconds before it", products: "products before it",
};

hfopt.current = () => hfopt.runs.get(hfopt.step.id);

// Steps are those that are drawn: the slider counts them.
hfopt.prepareStep = function () {
  const select = document.getElementById("which"), slider = document.getElementById("slider");
  if (!hfopt.shown.includes(hfopt.step.id)) { hfopt.step.id = hfopt.shown[0] || null; hfopt.step.follow = true; }
  select.replaceChildren(...hfopt.shown.map((id) => hfopt.element("option", { value: id, selected: id === hfopt.step.id }, id)));
  document.getElementById("which-label").hidden = hfopt.shown.length < 2;
  const run = hfopt.current(), last = run && run.columns.step ? run.columns.step.length - 1 : -1;
  slider.max = Math.max(0, last);
  slider.disabled = last < 1;
  // The closing row of a run that has ended has no step of its own.
  const closing = last > 0 && run.state !== "running" && run.columns.cg_iterations && !Number.isFinite(run.columns.cg_iterations[last]);
  if (hfopt.step.follow) slider.value = Math.max(0, closing ? last - 1 : last);
  hfopt.drawStep();
};

hfopt.drawStep = function () {
  const run = hfopt.current(), slider = document.getElementById("slider");
  const places = ["step-row", "recorded", "checks"].map((id) => document.getElementById(id));
  hfopt.step.charts.forEach(hfopt.forget);
  hfopt.step.charts = [];
  places.forEach((place) => place.replaceChildren());
  const output = document.getElementById("step-number");
  output.textContent = "";
  if (!run || !run.columns.step || !run.columns.step.length) return;
  const place = Math.min(Number(slider.value), run.columns.step.length - 1), step = run.columns.step[place];
  output.textContent = `step ${step} of ${run.columns.step[run.columns.step.length - 1]}`;
  slider.setAttribute("aria-valuetext", `step ${step}`);
  places[0].append(hfopt.rowList(run, place));
  hfopt.step.charts = hfopt.drawFrames(places[1], run, step);
  const checks = hfopt.checkTable(run, step);
  if (checks) places[2].append(checks);
};

hfopt.rowList = function (run, place) {
  const list = hfopt.element("dl"), metrics = new Map(run.metrics.map((metric) => [metric.column, metric]));
  const last = (values) => { let i = place; while (i >= 0 && !Number.isFinite(values[i])) i--; return i; };
  for (const [name, values] of Object.entries(run.columns)) {
    if (name === "step") continue;
    const metric = metrics.get(name), tested = metric || name === "test_loss";
    const at = tested ? last(values) : place;
    if (at < 0 || !Number.isFinite(values[at])) continue;
    const value = hfopt.number(values[at] * (metric ? metric.factor : 1), 5);
    const since = at === place ? "" : ` (step ${run.columns.step[at]})`;
    list.append(hfopt.element("div", { "data-column": name }, hfopt.element("dt", {}, metric ? metric.title : hfopt.TITLES[name] || name), hfopt.element("dd", {}, value + since)));
  }
  const reason = run.words.cg_reason && run.words.cg_reason[place];
  if (reason) list.append(hfopt.element("div", { "data-column": "cg_reason" }, hfopt.element("dt", {}, "CG stopped by"), hfopt.element("dd", {}, reason)));
  return list;
};

hfopt.checkTable = function (run, step) {
  const checks = run.checks;
  if (!checks.step) return null;
  const rows = [];
  for (let i = 0; i < checks.step.length; i++) if (checks.step[i] === step) rows.push(i);
  if (!rows.length) return null;
  const titles = { iteration: "iteration", model: "damped model", residual: "|residual|", norm: "|iterate|", evaluation: "loss change" };
  const names = Object.keys(titles).filter((name) => checks[name]);
  const taken = run.columns.backtracked ? run.columns.backtracked[Array.from(run.columns.step).indexOf(step)] : NaN;
  const body = rows.map((i) => {
    const row = hfopt.element("tr", {}, ...names.map((name) => hfopt.element("td", { class: "number" }, hfopt.number(checks[name][i], 5))));
    row.append(hfopt.element("td", {}, checks.iteration[i] === taken ? "← taken" : ""));
    return row;
  });
  const head = hfopt.element("tr", {}, ...names.map((name) => hfopt.element("th", { class: "number", scope: "col" }, titles[name])), hfopt.element("td"));
  const table = hfopt.element("table", {}, hfopt.element("thead", {}, head), hfopt.element("tbody", {}, ...body));
  return hfopt.element("div", { class: "panel" }, hfopt.element("h3", {}, `Conjugate gradients in step ${step}`), hfopt.element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "conjugate gradients" }, table));
};

// Go to the step of the present run that lies at a place of the curves' axis.
hfopt.goToX = function (value) {
  const run = hfopt.current();
  if (!run) return;
  const x = run.columns[hfopt.curves.axis];
  let best = 0;
  x.forEach((at, i) => { if (Math.abs(at - value) < Math.abs(x[best] - value)) best = i; });
  const slider = document.getElementById("slider");
  slider.value = best;
  hfopt.step.follow = best === x.length - 1;
  hfopt.drawStep();
};
