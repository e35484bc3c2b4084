"use strict";
// The list of runs, what they differ in, their configurations, and what happens when something is chosen or comes.
hfopt.list = []; // of a served page: all runs there are
hfopt.places = new Map();

hfopt.place = function (id) {
  if (!hfopt.places.has(id)) {
    const taken = new Set([...hfopt.places].filter(([other]) => hfopt.shown.includes(other)).map(([, place]) => place));
    let place = 0;
    while (taken.has(place)) place++;
    hfopt.places.set(id, place);
  }
  return hfopt.places.get(id);
};

hfopt.say = (text) => { document.getElementById("message").textContent = text; };

// Settings that are not the same in all runs that are shown.
hfopt.differing = function () {
  const runs = hfopt.shown.map((id) => hfopt.runs.get(id)).filter(Boolean);
  if (runs.length < 2) return [];
  const names = new Set(runs.flatMap((run) => Object.keys(run.settings)));
  const left = (name) => name === "model.printed" || name.startsWith("metrics.");
  return [...names].filter((name) => !left(name) && new Set(runs.map((run) => JSON.stringify(run.settings[name]) ?? "")).size > 1);
};

hfopt.words = function (value) {
  if (value === undefined || value === null) return "–";
  const text = typeof value === "number" ? hfopt.number(value, 6) : Array.isArray(value) ? value.join(", ") : String(value);
  return text.length > 60 ? `${text.slice(0, 57)}…` : text;
};

hfopt.drawRuns = function () {
  const place = document.getElementById("runs"), live = hfopt.page.live;
  const wanted = document.getElementById("filter").value.trim().toLowerCase();
  const all = live ? hfopt.list : [...hfopt.runs.values()];
  const rows = all.filter((run) => !wanted || run.id.toLowerCase().includes(wanted) || hfopt.shown.includes(run.id));
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.run : null;
  const head = ["run", "state", "steps", "loss", "error", "seconds", ...(live ? ["model", "problem", "optimizer"] : [])];
  const body = rows.map((listed) => {
    const run = hfopt.runs.get(listed.id) || listed, shown = hfopt.shown.includes(listed.id);
    const box = hfopt.element("input", { type: "checkbox", checked: shown, "data-run": listed.id, disabled: listed.state === "damaged", onchange: () => hfopt.choose(listed.id, box.checked) });
    const swatch = hfopt.element("i", { class: "swatch" });
    swatch.style.borderColor = shown ? hfopt.colour(hfopt.place(listed.id)) : "transparent";
    const cells = [
      hfopt.element("th", { scope: "row" }, hfopt.element("label", {}, box, " ", swatch, listed.id)),
      hfopt.element("td", { class: `state-${run.state}`, title: run.said || "" }, run.state + (run.outcome ? ` (${run.outcome})` : "")),
      ...[hfopt.number(run.step, 6), hfopt.number(run.loss, 4), run.error || "", hfopt.number(run.seconds, 4)].map((text) => hfopt.element("td", { class: "number" }, text)),
      ...(live ? [run.model, run.problem, run.optimizer].map((text) => hfopt.element("td", {}, text || "")) : []),
    ];
    return hfopt.element("tr", { "data-row": listed.id }, ...cells);
  });
  const titles = head.map((title, i) => hfopt.element("th", { scope: "col", class: i >= 2 && i <= 5 ? "number" : "" }, title));
  place.replaceChildren(hfopt.element("table", {}, hfopt.element("thead", {}, hfopt.element("tr", {}, ...titles)), hfopt.element("tbody", {}, ...body)));
  if (focused) { const box = [...place.querySelectorAll("input")].find((input) => input.dataset.run === focused); if (box) box.focus(); }
  document.getElementById("runs-note").textContent = all.length ? "" : "There are no runs here yet.";
  hfopt.drawDifferences();
};

hfopt.drawDifferences = function () {
  const place = document.getElementById("differences"), runs = hfopt.shown.map((id) => hfopt.runs.get(id)).filter(Boolean);
  const names = hfopt.differing();
  place.hidden = runs.length < 2;
  if (place.hidden) return;
  document.getElementById("differences-title").textContent = names.length ? `${names.length} settings differ` : "The settings are the same";
  const head = hfopt.element("tr", {}, hfopt.element("th", { scope: "col" }, "setting"), ...runs.map((run) => hfopt.element("th", { scope: "col" }, run.id)));
  const body = names.map((name) => hfopt.element("tr", { "data-setting": name }, hfopt.element("th", { scope: "row" }, name), ...runs.map((run) => hfopt.element("td", {}, hfopt.words(run.settings[name])))));
  const table = hfopt.element("table", {}, hfopt.element("thead", {}, head), hfopt.element("tbody", {}, ...body));
  place.querySelector(".wide").replaceChildren(...(names.length ? [table] : []));
};

hfopt.drawSettings = function () {
  const place = document.getElementById("settings"), open = new Set([...place.querySelectorAll("details[open]")].map((d) => d.dataset.run));
  const made = hfopt.shown.map((id) => hfopt.runs.get(id)).filter(Boolean).map((run, i, all) => {
    const lines = [["begun", run.created], ["seed", run.seed], ...Object.entries(run.facts), ...Object.entries(run.settings)];
    const rows = lines.map(([name, value]) => hfopt.element("tr", {}, hfopt.element("th", { scope: "row" }, name), hfopt.element("td", { class: "long" }, value === null || value === undefined ? "–" : Array.isArray(value) ? value.join(", ") : String(value))));
    return hfopt.element("details", { "data-run": run.id, open: open.has(run.id) || (all.length === 1 && !hfopt.page.live) }, hfopt.element("summary", {}, run.id), hfopt.element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `configuration of ${run.id}` }, hfopt.element("table", {}, hfopt.element("tbody", {}, ...rows))));
  });
  place.replaceChildren(...made);
};

hfopt.drawAll = function () {
  hfopt.drawRuns();
  hfopt.drawCurves();
  hfopt.prepareStep();
  hfopt.drawSettings();
};

hfopt.choose = async function (id, show) {
  hfopt.shown = hfopt.shown.filter((other) => other !== id);
  if (show) {
    try {
      if (!hfopt.runs.has(id)) hfopt.runs.set(id, hfopt.decoded(await hfopt.ask("api/run", { name: id })));
      hfopt.shown = [...hfopt.shown.filter((other) => other !== id), id];
      hfopt.say("");
    } catch (error) { hfopt.say(`${id}: ${error.message}`); }
  } else hfopt.places.delete(id);
  if (hfopt.page.live) history.replaceState(null, "", `#${hfopt.shown.map(encodeURIComponent).join("&")}`);
  hfopt.drawAll();
};

// The rows behind the last one that is there, of runs that may have gone on; everything if they were computed again.
hfopt.poll = async function () {
  const list = (await hfopt.ask("api/runs")).runs;
  const before = JSON.stringify(hfopt.list);
  hfopt.list = list;
  let changed = false, frames = false;
  for (const id of hfopt.shown) {
    const run = hfopt.runs.get(id), now = list.find((other) => other.id === id);
    if (!run || !now || now.state === "damaged" || (now.finished === run.finished && now.state === run.state && now.rows === run.rows)) continue;
    const steps = run.columns.step, after = steps && steps.length ? steps[steps.length - 1] : -1;
    const more = await hfopt.ask("api/rows", { name: id, after, finished: run.finished });
    if (more.again || JSON.stringify(more.frames) !== JSON.stringify(run.frames)) {
      hfopt.runs.set(id, hfopt.decoded(await hfopt.ask("api/run", { name: id })));
      frames = true;
    } else hfopt.extend(run, more);
    changed = true;
  }
  if (changed) {
    hfopt.drawCurves();
    if (frames || hfopt.step.follow) hfopt.prepareStep();
    else document.getElementById("slider").max = hfopt.current().columns.step.length - 1;
  }
  if (changed || JSON.stringify(list) !== before) hfopt.drawRuns();
};

hfopt.live = async function () {
  try {
    await hfopt.poll();
    if (document.getElementById("message").dataset.lost) { hfopt.say(""); delete document.getElementById("message").dataset.lost; }
  } catch (error) {
    hfopt.say(`The server does not answer (${error.message}); asking again.`);
    document.getElementById("message").dataset.lost = "yes";
  }
  setTimeout(hfopt.live, document.hidden ? 5000 : 1000);
};

hfopt.begin = async function () {
  const slider = document.getElementById("slider"), axis = document.getElementById("axis"), which = document.getElementById("which");
  let due = 0;
  slider.addEventListener("input", () => {
    hfopt.step.follow = slider.value === slider.max;
    cancelAnimationFrame(due);
    due = requestAnimationFrame(hfopt.drawStep);
  });
  axis.addEventListener("change", () => { hfopt.curves.axis = axis.value; hfopt.drawCurves(); });
  which.addEventListener("change", () => { hfopt.step.id = which.value; hfopt.step.follow = true; hfopt.prepareStep(); });
  document.getElementById("whole").addEventListener("click", () => hfopt.curves.charts.forEach((chart) => chart.plot.setData(chart.plot.data, true)));
  document.getElementById("filter").addEventListener("input", hfopt.drawRuns);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", hfopt.drawAll);
  for (const run of hfopt.page.runs) { hfopt.runs.set(run.id, hfopt.decoded(run)); hfopt.shown.push(run.id); }
  if (!hfopt.page.live) return hfopt.drawAll();
  document.getElementById("filter-line").hidden = false;
  try {
    hfopt.list = (await hfopt.ask("api/runs")).runs;
    const named = location.hash.slice(1).split("&").filter(Boolean).map(decodeURIComponent);
    const newest = [...hfopt.list].filter((run) => run.state !== "damaged").sort((a, b) => b.finished - a.finished).slice(0, 1).map((run) => run.id);
    for (const id of (named.length ? named : newest).filter((id) => hfopt.list.some((run) => run.id === id))) {
      hfopt.runs.set(id, hfopt.decoded(await hfopt.ask("api/run", { name: id })));
      hfopt.shown.push(id);
    }
  } catch (error) { hfopt.say(error.message); }
  hfopt.drawAll();
  setTimeout(hfopt.live, 1000);
};

hfopt.begin();
