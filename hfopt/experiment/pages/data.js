"use strict";
// Data of runs: what the page holds inside, or asks the server for.
const hfopt = {
  page: JSON.parse(document.getElementById("data").textContent),
  runs: new Map(), // by id, with decoded columns
  shown: [], // ids, in the order in which they were chosen; a run keeps its colour
};

hfopt.element = function (tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
};

hfopt.unpack = function (packed) {
  const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
  const kinds = { f4: Float32Array, f8: Float64Array, i4: Int32Array, u1: Uint8Array };
  return new kinds[packed.type](bytes.buffer);
};

hfopt.decoded = function (run) {
  const made = { ...run, columns: {}, checks: {}, recorded: {} };
  for (const [name, packed] of Object.entries(run.columns)) made.columns[name] = hfopt.unpack(packed);
  for (const [name, packed] of Object.entries(run.checks)) made.checks[name] = hfopt.unpack(packed);
  for (const [name, frames] of Object.entries(run.recorded || {})) {
    const arrays = {};
    for (const [key, packed] of Object.entries(frames.arrays))
      arrays[key] = { shape: packed.shape.slice(1), values: hfopt.unpack(packed), changes: true };
    for (const [key, packed] of Object.entries(frames.constant))
      arrays[key] = { shape: packed.shape, values: hfopt.unpack(packed), changes: false };
    made.recorded[name] = { ...frames, arrays };
  }
  return made;
};

// Rows that have come since, behind those that are there.
hfopt.extend = function (run, more) {
  const before = run.columns.step ? run.columns.step.length : 0;
  const count = hfopt.unpack(more.columns.step).length;
  const names = new Set([...Object.keys(run.columns), ...Object.keys(more.columns)]);
  for (const name of names) {
    const joined = new Float64Array(before + count).fill(NaN);
    if (run.columns[name]) joined.set(run.columns[name]);
    if (more.columns[name]) joined.set(hfopt.unpack(more.columns[name]), before);
    run.columns[name] = joined;
  }
  for (const name of Object.keys(more.checks)) {
    const new_ = hfopt.unpack(more.checks[name]);
    const joined = new Float64Array((run.checks[name] || []).length + new_.length);
    joined.set(run.checks[name] || []);
    joined.set(new_, joined.length - new_.length);
    run.checks[name] = joined;
  }
  for (const name of new Set([...Object.keys(run.words), ...Object.keys(more.words)])) {
    const old = run.words[name] || new Array(before).fill("");
    run.words[name] = [...old, ...(more.words[name] || new Array(count).fill(""))];
  }
  for (const name of ["state", "outcome", "step", "rows", "seconds", "loss", "error", "finished", "of"]) run[name] = more[name];
  return count;
};

hfopt.ask = async function (path, query) {
  const answer = await fetch(`${path}?${new URLSearchParams(query || {})}`, { cache: "no-store" });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error || answer.statusText);
  return found;
};

hfopt.number = function (value, digits) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
};

// Okabe and Ito's colours, told apart by the colour-blind; yellow is for dark paper alone.
hfopt.dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
hfopt.colour = function (place) {
  const light = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];
  const dark = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#ffffff"];
  return (hfopt.dark() ? dark : light)[place % 7];
};
hfopt.variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
