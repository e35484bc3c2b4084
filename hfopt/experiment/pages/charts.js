"use strict";
// A chart in a panel: uPlot, a line that reads the values under the cursor, and arrow keys.
hfopt.charts = new Set();

// tables: [{x, y, label, colour, dashed}], each with its own x; options: {title, log, logX, height, sync, range, onStep, xLabel}
hfopt.chart = function (place, tables, options) {
  const readout = hfopt.element("p", { class: "readout" });
  const holder = hfopt.element("div", { tabindex: "0", role: "img", "aria-label": `${options.title}: ${tables.map((t) => t.label).join(", ")}` });
  const panel = hfopt.element("div", { class: "panel" }, hfopt.element("h3", {}, options.title), readout, holder);
  place.append(panel);
  const chart = { tables, options, holder, readout, plot: null, fixed: null };
  hfopt.draw(chart);
  hfopt.charts.add(chart);
  holder.addEventListener("keydown", (event) => hfopt.moveByKey(chart, event));
  return chart;
};

// Limits a little beyond the values, by a share of what they span.
hfopt.wide = function (low, high, log, share = 0) {
  if (low === null || high === null) return log ? [0.1, 1] : [0, 1];
  if (log) { const more = low === high ? 2 : (high / low) ** share; return [low / more, high * more]; }
  const more = low === high ? Math.abs(low) || 1 : share * (high - low);
  return low === high && share === 0 ? [low, low + 1] : [low - more, high + more];
};

// Ticks of a logarithmic axis: powers of ten, thinned where they are many; 1, 2, 5 between where they are few.
hfopt.decades = {
  splits: (u, axis, low, high) => {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
    const every = Math.ceil((last - first) / 7), factors = last - first > 3 ? [1] : last - first > 1 ? [1, 3] : [1, 2, 3, 5, 7];
    for (let power = first; power <= last; power += every) for (const factor of factors) found.push(factor * 10 ** power);
    const seen = found.filter((tick) => tick >= low && tick <= high);
    return seen.length ? seen : [low, high];
  },
  filter: (u, splits) => splits,
};

hfopt.joined = function (chart) {
  const positive = (value) => (Number.isFinite(value) && (!chart.options.log || value > 0) ? value : null);
  const tables = chart.tables.map((table) => {
    const x = [], y = [];
    for (let i = 0; i < table.x.length; i++) {
      const value = positive(table.y[i]);
      if (value !== null && Number.isFinite(table.x[i]) && (!chart.options.logX || table.x[i] > 0)) { x.push(table.x[i]); y.push(value); }
    }
    return [x, y];
  });
  return tables.length === 1 ? tables[0] : uPlot.join(tables);
};

hfopt.draw = function (chart) {
  const { options, tables, holder } = chart;
  if (chart.plot) chart.plot.destroy();
  const ink = hfopt.variable("--soft"), grid = { stroke: hfopt.variable("--line"), width: 1 };
  const axis = { stroke: ink, grid, ticks: grid, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 18 };
  const data = hfopt.joined(chart);
  chart.data = data;
  chart.width = Math.max(200, holder.clientWidth);
  const few = data[0].length < 60;
  const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : hfopt.number(tick, 3)));
  const plot = new uPlot(
    {
      width: chart.width, height: options.height || 190, legend: { show: false }, pxAlign: false,
      scales: {
        x: { time: false, distr: options.logX ? 3 : 1, range: (u, low, high) => chart.options.extent || hfopt.wide(low, high, options.logX) },
        y: { distr: options.log ? 3 : 1, range: (u, low, high) => chart.options.range || hfopt.wide(low, high, options.log, 0.05) },
      },
      axes: [
        { ...axis, values, label: options.xLabel, size: 34, gap: 4, ...(options.logX ? hfopt.decades : {}) },
        { ...axis, values, size: 58, gap: 4, ...(options.log ? hfopt.decades : {}) },
      ],
      series: [
        {},
        ...tables.map((table) => ({
          label: table.label, stroke: table.colour, width: table.dashed ? 1.4 : 2, dash: table.dashed ? [6, 4] : undefined, spanGaps: true,
          points: { show: table.points || few, size: table.points ? 8 : 5, fill: table.points ? hfopt.variable("--panel") : table.colour, stroke: table.colour },
          paths: table.points ? () => null : undefined,
        })),
      ],
      cursor: {
        y: false, drag: { x: true, y: false, dist: 6 }, sync: options.sync ? { key: options.sync, setSeries: false } : undefined,
        focus: { prox: -1 }, points: { size: 7 },
        dataIdx: (u, series, hovered) => hfopt.nearest(u.data[series], u.data[0], hovered),
        bind: options.onStep ? { click: (u, _, handle) => (event) => { handle(event); if (u.cursor.idx !== null && !chart.dragged) options.onStep(u.posToVal(u.cursor.left, "x")); return null; } } : {},
      },
      hooks: {
        setCursor: [() => hfopt.read(chart)],
        setSelect: [(u) => { chart.dragged = u.select.width > 0; setTimeout(() => (chart.dragged = false), 50); }],
      },
    },
    data, holder,
  );
  chart.plot = plot;
  hfopt.read(chart);
};

// The nearest place at which a series has a value: runs have values at different x.
hfopt.nearest = function (values, x, hovered) {
  if (hovered === null || hovered === undefined) return hovered;
  if (values[hovered] !== null && values[hovered] !== undefined) return hovered;
  const known = (i) => values[i] !== null && values[i] !== undefined;
  let left = hovered, right = hovered;
  while (left >= 0 && !known(left)) left--;
  while (right < values.length && !known(right)) right++;
  if (left < 0) return right < values.length ? right : null;
  if (right >= values.length) return left;
  return x[hovered] - x[left] <= x[right] - x[hovered] ? left : right;
};

hfopt.read = function (chart) {
  const plot = chart.plot;
  if (!plot) return;
  const at = plot.cursor.idx, parts = [];
  chart.tables.forEach((table, place) => {
    const known = plot.data[place + 1];
    let index = plot.cursor.idxs ? plot.cursor.idxs[place + 1] : null;
    if (at === null || at === undefined) { index = known.length - 1; while (index >= 0 && (known[index] === null || known[index] === undefined)) index--; }
    const value = index === null || index === undefined || index < 0 ? null : known[index];
    const mark = hfopt.element("i", { class: `legend-mark${table.dashed ? " dashed" : ""}` });
    mark.style.borderColor = table.colour;
    parts.push(hfopt.element("span", {}, mark, `${table.label} ${hfopt.number(value, 4)}`));
  });
  chart.readout.replaceChildren(...parts);
};

hfopt.moveByKey = function (chart, event) {
  const plot = chart.plot, x = plot.data[0];
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageDown: 20, PageUp: -20, Home: -x.length, End: x.length };
  if (event.key === "Enter" && chart.options.onStep && plot.cursor.idx !== null) return chart.options.onStep(x[plot.cursor.idx]);
  if (!(event.key in moves) || !x.length) return;
  event.preventDefault();
  const now = plot.cursor.idx === null || plot.cursor.idx === undefined ? (moves[event.key] > 0 ? -1 : x.length) : plot.cursor.idx;
  const value = x[Math.min(x.length - 1, Math.max(0, now + moves[event.key]))];
  for (const other of chart.options.sync ? hfopt.charts : [chart])
    if (other.options.sync === chart.options.sync) other.plot.setCursor({ left: other.plot.valToPos(value, "x"), top: 10 });
};

hfopt.update = function (chart, tables, options) {
  chart.tables = tables;
  const x = chart.plot.data[0], scale = chart.plot.scales.x, before = chart.options.extent || [x[0], x[x.length - 1]];
  Object.assign(chart.options, options);
  const same = chart.plot.series.length === tables.length + 1 && chart.plot.data[0].length >= 60;
  if (!same) return hfopt.draw(chart);
  const enlarged = scale.min > before[0] || scale.max < before[1];
  chart.plot.setData(hfopt.joined(chart), !enlarged);
  if (enlarged) chart.plot.redraw();
  hfopt.read(chart);
};

hfopt.forget = function (chart) {
  chart.plot.destroy();
  hfopt.charts.delete(chart);
};

addEventListener("resize", () => {
  for (const chart of hfopt.charts) {
    const width = Math.max(200, chart.holder.clientWidth);
    if (width !== chart.width) { chart.width = width; chart.plot.setSize({ width, height: chart.plot.height }); }
  }
});
