"use strict";
// Recorded frames of a step: hidden states, spectra, gradients by lag, densities, samples.
hfopt.frames = { sequence: 0 };

hfopt.frameAt = function (frames, step) {
  let place = 0;
  frames.steps.forEach((known, i) => { if (Math.abs(known - step) < Math.abs(frames.steps[place] - step)) place = i; });
  return place;
};

hfopt.arrayAt = function (frames, name, place) {
  const array = frames.arrays[name];
  if (!array) return null;
  const size = array.shape.reduce((a, b) => a * b, 1);
  return { shape: array.shape, values: array.changes ? array.values.subarray(place * size, (place + 1) * size) : array.values };
};

// The last axis counts sequences.
hfopt.ofSequence = function (array, sequence) {
  if (!array) return null;
  const sequences = array.shape[array.shape.length - 1], shape = array.shape.slice(0, -1);
  const count = shape.reduce((a, b) => a * b, 1), values = new Float64Array(count);
  for (let i = 0; i < count; i++) values[i] = array.values[i * sequences + Math.min(sequence, sequences - 1)];
  return { shape, values };
};

hfopt.rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
hfopt.shade = function (share, signed) {
  const zero = hfopt.rgb(hfopt.variable("--zero")), plus = hfopt.rgb(signed ? "#d55e00" : hfopt.variable("--ink")), minus = hfopt.rgb("#0072b2");
  const end = share < 0 ? minus : plus, weight = Math.min(1, Math.abs(share));
  return zero.map((z, i) => z + (end[i] - z) * weight);
};

// values (T, rows) drawn with time to the right; `top` is the value of the full colour.
hfopt.image = function (place, label, array, top, signed, height) {
  const [T, rows] = [array.shape[0], array.shape.length > 1 ? array.shape[1] : 1];
  const canvas = hfopt.element("canvas", { width: T, height: rows, tabindex: "0", role: "img", "aria-label": `${label}: ${rows} rows, ${T} steps` });
  canvas.style.height = `${height || Math.min(260, Math.max(14 * rows, 26))}px`;
  const image = new ImageData(T, rows), table = Array.from({ length: 513 }, (_, i) => hfopt.shade((i - 256) / 256, signed));
  for (let t = 0; t < T; t++)
    for (let row = 0; row < rows; row++) {
      const share = Math.max(-1, Math.min(1, array.values[t * rows + row] / top));
      image.data.set([...table[Math.round(share * 256) + 256], 255], 4 * (row * T + t));
    }
  canvas.getContext("2d").putImageData(image, 0, 0);
  const scale = hfopt.element("canvas", { width: 1, height: 65 });
  const colours = new ImageData(1, 65);
  for (let i = 0; i < 65; i++) colours.data.set([...hfopt.shade(signed ? 1 - i / 32 : 1 - i / 64, signed), 255], 4 * i);
  scale.getContext("2d").putImageData(colours, 0, 0);
  const bar = hfopt.element("div", { class: "bar", "aria-hidden": "true" }, scale, hfopt.element("span", { class: "top" }, hfopt.number(top, 2)), hfopt.element("span", { class: "bottom" }, signed ? hfopt.number(-top, 2) : "0"));
  const mean = array.values.reduce((sum, value) => sum + Math.abs(value), 0) / Math.max(1, array.values.length);
  const summary = `${label}, mean size ${hfopt.number(mean, 4)}`;
  const said = hfopt.element("p", { class: "readout" }, summary);
  const at = { t: 0, row: 0 };
  const read = () => { said.textContent = `${summary}; step ${at.t}, row ${at.row}: ${hfopt.number(array.values[at.t * rows + at.row], 4)}`; };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    at.t = Math.min(T - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * T)));
    at.row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    read();
  });
  canvas.addEventListener("pointerleave", () => { said.textContent = summary; });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    at.t = Math.min(T - 1, Math.max(0, at.t + moves[event.key][0]));
    at.row = Math.min(rows - 1, Math.max(0, at.row + moves[event.key][1]));
    read();
  });
  place.append(said, hfopt.element("div", { class: "image" }, canvas, bar));
};

hfopt.largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;

hfopt.drawHidden = function (place, frames, at) {
  const hidden = hfopt.arrayAt(frames, "hidden", at);
  const sequences = hidden.shape[hidden.shape.length - 1];
  const choice = hfopt.element("select", { id: "sequence" }, ...Array.from({ length: sequences }, (_, i) => hfopt.element("option", { value: i, selected: i === Math.min(hfopt.frames.sequence, sequences - 1) }, String(i))));
  choice.addEventListener("change", () => { hfopt.frames.sequence = Number(choice.value); hfopt.drawStep(); document.getElementById("sequence").focus(); });
  place.append(hfopt.element("p", { class: "controls" }, hfopt.element("label", {}, "test sequence ", choice)));
  const s = hfopt.frames.sequence, of = (name) => hfopt.ofSequence(hfopt.arrayAt(frames, name, at), s);
  const inputs = of("inputs"), states = of("hidden"), outputs = of("outputs"), targets = of("targets"), scored = of("scored");
  if (inputs) hfopt.image(place, "inputs", inputs, hfopt.largest(frames.arrays.inputs.values), inputs.values.some((v) => v < 0));
  hfopt.image(place, "hidden units", states, hfopt.largest(frames.arrays.hidden.values), true, 240);
  if (!outputs) return null;
  const T = outputs.shape[0], count = outputs.shape.length > 1 ? outputs.shape[1] : 1;
  if (count > 4 || T !== states.shape[0]) { hfopt.image(place, "predictions", T === states.shape[0] ? outputs : { shape: [1, T], values: outputs.values }, hfopt.largest(frames.arrays.outputs.values), outputs.values.some((v) => v < 0)); return null; }
  const steps = Float64Array.from({ length: T }, (_, t) => t), tables = [];
  for (let o = 0; o < count; o++) {
    const suffix = count > 1 ? ` ${o}` : "";
    tables.push({ x: steps, y: steps.map((t) => outputs.values[t * count + o]), label: `prediction${suffix}`, colour: hfopt.colour(2 * o) });
    if (targets && targets.values.length >= T * count) {
      const counted = (t) => !scored || scored.values[t * (scored.values.length / T)] > 0;
      tables.push({ x: steps, y: steps.map((t) => (counted(t) ? targets.values[t * count + o] : NaN)), label: `target${suffix}`, colour: hfopt.colour(2 * o + 1), points: true });
    } else if (targets && targets.values.length === count)
      tables.push({ x: [T - 1], y: [targets.values[o]], label: `target${suffix}`, colour: hfopt.colour(2 * o + 1), points: true });
  }
  return hfopt.chart(place, tables, { title: "prediction", xLabel: "step of the sequence", height: 170 });
};

hfopt.drawSpectrum = function (place, frames, at) {
  const real = hfopt.arrayAt(frames, "real", at).values, imag = hfopt.arrayAt(frames, "imag", at).values;
  const all = frames.arrays, most = 1.08 * Math.max(1.05, hfopt.largest(all.real.values), hfopt.largest(all.imag.values));
  const make = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const x = (value) => 30 + (280 * (value + most)) / (2 * most), y = (value) => 10 + (280 * (most - value)) / (2 * most);
  const radius = real.reduce((r, value, i) => Math.max(r, Math.hypot(value, imag[i])), 0);
  const svg = make("svg", { viewBox: "0 0 320 312", role: "img", "aria-label": `eigenvalues in the complex plane, largest modulus ${hfopt.number(radius, 4)}` });
  svg.append(make("rect", { x: 30, y: 10, width: 280, height: 280, class: "frame" }));
  for (const [x1, y1, x2, y2] of [[x(-most), y(0), x(most), y(0)], [x(0), y(-most), x(0), y(most)]]) svg.append(make("line", { x1, y1, x2, y2, stroke: "var(--line)" }));
  svg.append(make("circle", { cx: x(0), cy: y(0), r: 140 / most, class: "unit" }));
  for (const tick of [-1, 0, 1]) svg.append(make("text", { x: x(tick), y: 305, "text-anchor": "middle" }, String(tick)), make("text", { x: 24, y: y(tick) + 4, "text-anchor": "end" }, tick === 0 ? "0" : `${tick < 0 ? "−" : ""}i`));
  for (let i = 0; i < real.length; i++) svg.append(make("circle", { cx: x(real[i]), cy: y(imag[i]), r: 2.6, class: "dot" }));
  place.append(hfopt.element("p", { class: "readout" }, `largest modulus ${hfopt.number(radius, 4)}; the dashed circle is the unit circle`), svg);
};

hfopt.drawLine = function (place, frames, at, x, y, options) {
  const [horizontal, vertical] = [x, y].map((name) => hfopt.arrayAt(frames, name, at).values);
  const all = Array.from(frames.arrays[y].values).filter((v) => Number.isFinite(v) && (!options.log || v > 0));
  const low = all.reduce((a, b) => Math.min(a, b), Infinity), high = all.reduce((a, b) => Math.max(a, b), -Infinity);
  const range = all.length ? hfopt.wide(low, high, options.log, 0.05) : undefined;
  const labels = frames.about.labels;
  return hfopt.chart(place, [{ x: horizontal, y: vertical, label: labels[y] || y, colour: hfopt.colour(0) }], { title: labels[y] || y, xLabel: labels[x] || x, range, ...options });
};

hfopt.drawFrames = function (place, run, step) {
  const charts = [];
  const order = ["hidden", "real", "lag", "grid", "text"], rank = ([, frames]) => order.findIndex((key) => key in frames.arrays) + 1 || 9;
  for (const [name, frames] of Object.entries(run.recorded).sort((a, b) => rank(a) - rank(b))) {
    if (!frames.steps.length) continue;
    const at = hfopt.frameAt(frames, step), has = (...keys) => keys.every((key) => key in frames.arrays);
    const panel = hfopt.element("div", { class: `panel${has("hidden") ? " full" : ""}`, "data-recorder": name });
    panel.append(hfopt.element("h3", {}, `${frames.about.title || name} at step ${frames.steps[at]}`));
    place.append(panel);
    let chart = null;
    if (has("hidden")) chart = hfopt.drawHidden(panel, frames, at);
    else if (has("real", "imag")) hfopt.drawSpectrum(panel, frames, at);
    else if (has("lag", "norm")) chart = hfopt.drawLine(panel, frames, at, "lag", "norm", { log: true });
    else if (has("grid", "density")) chart = hfopt.drawLine(panel, frames, at, "grid", "density", { logX: true });
    else if (has("text")) {
      const bytes = Uint8Array.from(hfopt.arrayAt(frames, "text", at).values);
      const end = bytes.indexOf(0);
      panel.append(hfopt.element("pre", { tabindex: "0" }, new TextDecoder().decode(end < 0 ? bytes : bytes.subarray(0, end))));
    } else for (const key of Object.keys(frames.arrays)) {
      const array = hfopt.arrayAt(frames, key, at);
      if (array.shape.length === 2) hfopt.image(panel, key, array, hfopt.largest(frames.arrays[key].values), true);
      else panel.append(hfopt.element("p", { class: "readout" }, `${key}: ${Array.from(array.values.slice(0, 8), (v) => hfopt.number(v, 4)).join(", ")}`));
    }
    if (chart) charts.push(chart);
    if (frames.steps.length < frames.of) panel.append(hfopt.element("p", { class: "note" }, `${frames.steps.length} of ${frames.of} recorded steps are in this page`));
  }
  return charts;
};
