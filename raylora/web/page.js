// The live page: one stream of records, drawn anew whenever one comes. Whatever a run says is put in as text, never as
// markup, and nothing is fetched from elsewhere.
"use strict";

const COLORS = ["#2563a8", "#c2571a", "#23744a", "#8a3ca8", "#b3261e", "#0f7d8c", "#8a6d00", "#c0387a", "#4b5563", "#5b8c1a"];
const PREFERRED = ["nll", "perplexity", "rmse"];
const key = (location.pathname.match(/^\/runs\/([^/]+)\//) || [])[1];
const byId = (id) => document.getElementById(id);
const chosen = { metric: null, member: null };
let latest = null;

// --- words ------------------------------------------------------------------------------------------------------
function duration(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  if (whole < 120) return `${whole} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}

function moment(at) {
  const date = new Date(at * 1000), today = new Date().toDateString() === date.toDateString();
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
  return today ? time : `${date.toLocaleDateString()} ${time}`;
}

function headline(record) {
  const words = [`${record.members_done} of ${record.member_count} done`];
  const preparation = record.preparation;
  if (record.phase === "preparing") words.push(preparation
    ? `preparing the base: block ${preparation.block} of ${preparation.blocks}` : "preparing the base");
  const starting = record.workers.filter((worker) => worker.state === "starting");
  if (starting.length && !record.is_over) words.push(`loading the base in ${starting.length} worker${starting.length > 1 ? "s" : ""}`);
  if (record.queue_length) words.push(`${record.queue_length} job${record.queue_length > 1 ? "s" : ""} waiting`);
  if (record.eta_s && !record.lifeless) words.push(`about ${duration(record.eta_s)} left in all`);
  if (record.is_over && record.started_at) words.push(`took ${duration(record.updated_at - record.started_at)}`);
  return words.join(" · ") + (record.reason ? ` (${record.reason})` : "");
}

// --- elements ---------------------------------------------------------------------------------------------------
function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function cell(content, kind) {
  const made = element("td", undefined, kind);
  made.append(content);
  return made;
}

function row(...cells) {
  const made = element("tr");
  made.append(...cells);
  return made;
}

function bar(share) {
  const made = element("div", undefined, "bar"), inner = element("div");
  inner.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  made.append(inner);
  return made;
}

function say(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = !text;
}

function link(text, address) {
  const made = element("a", text);
  made.href = address;
  return made;
}

// --- charts -----------------------------------------------------------------------------------------------------
function shape(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 3));
  const wide = [1, 2, 5, 10].map((times) => times * step).find((size) => (high - low) / size <= 5);
  const found = [];
  for (let n = Math.ceil(low / wide - 1e-9); n * wide <= high + wide * 1e-9; n++) found.push(n * wide);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(wide) + 1e-9)) };
}

function chart(place, lines, what, steps) {
  const points = lines.flatMap((line) => line.points);
  if (!points.length) {
    place.replaceChildren(element("p", `no ${what} yet`, "quiet"));
    return;
  }
  const width = Math.max(240, place.clientWidth), height = width < 400 ? 200 : 230;
  const left = 46, right = 8, top = 8, bottom = 24;
  const ys = points.map((point) => point[1]);
  let low = Math.min(...ys), high = Math.max(...ys);
  const air = (high - low || Math.abs(high) || 1) * 0.08;
  [low, high] = [low - air, high + air];
  const x = (step) => left + (width - left - right) * step / steps;
  const y = (value) => height - bottom - (height - top - bottom) * (value - low) / (high - low);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${what} by step` });
  const vertical = ticks(low, high), horizontal = ticks(0, steps);
  for (const value of vertical.found) {
    svg.append(shape("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(vertical.digits)));
  }
  for (const step of horizontal.found.filter(Number.isInteger)) {
    const anchor = step === 0 ? "start" : x(step) > width - 24 ? "end" : "middle";
    svg.append(shape("text", { x: x(step), y: height - 6, "text-anchor": anchor }, step === 0 ? "step 0" : String(step)));
  }
  for (const line of lines) {
    const faint = chosen.member && chosen.member !== line.name ? " faint" : "";
    if (line.points.length <= 30) for (const [step, value] of line.points) {
      svg.append(shape("circle", { cx: x(step), cy: y(value), r: 2.5, fill: line.color, class: faint.trim() }));
    }
    const path = line.points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    const drawn = shape("polyline", { points: path, stroke: line.color, class: `curve${faint}` });
    drawn.append(shape("title", {}, line.name));
    svg.append(drawn);
  }
  place.replaceChildren(svg);
}

function drawCurves(record) {
  const members = Object.keys(record.curves).sort();
  byId("curves").hidden = !members.length;
  const metrics = [...new Set(members.flatMap((name) => Object.keys(record.curves[name])))].filter((name) => name !== "loss").sort();
  const select = byId("metric");
  if ([...select.options].map((option) => option.value).join() !== metrics.join()) {
    select.replaceChildren(...metrics.map((name) => {
      const option = element("option", record.labels[name] || name);
      option.value = name;
      return option;
    }));
  }
  if (!metrics.includes(chosen.metric)) chosen.metric = PREFERRED.find((name) => metrics.includes(name)) || metrics[0] || null;
  select.hidden = !metrics.length;
  if (chosen.metric) select.value = chosen.metric;
  const lines = (series) => members.map((name, n) => (
    { name, color: COLORS[n % COLORS.length], points: (record.curves[name][series] || []) }));
  const steps = Math.max(1, ...members.flatMap((name) => Object.values(record.curves[name]).map((points) => points.at(-1)[0])));
  chart(byId("loss"), lines("loss"), "training loss", steps);
  chart(byId("validation"), chosen.metric ? lines(chosen.metric) : [], chosen.metric
    ? `validation ${record.labels[chosen.metric] || chosen.metric}` : "validation", steps);
  const names = byId("legend");
  if (names.dataset.names !== members.join()) {
    names.dataset.names = members.join();
    names.replaceChildren(...members.map((name, n) => {
      const button = element("button"), mark = element("i");
      mark.style.background = COLORS[n % COLORS.length];
      button.type = "button";
      button.append(mark, name);
      button.addEventListener("click", () => {
        chosen.member = chosen.member === name ? null : name;
        drawCurves(latest);
      });
      return button;
    }));
  }
  members.forEach((name, n) => names.children[n].setAttribute("aria-pressed", String(chosen.member === name)));
  say("curves-note", members.length < record.member_count && record.member_count > 24
    ? `${members.length} of ${record.member_count} members, those at work first` : "");
}

// --- a run ------------------------------------------------------------------------------------------------------
function drawMembers(record) {
  byId("members").querySelector("tbody").replaceChildren(...record.members.map((member) => {
    const done = element("div");
    if (member.state === "running" && member.total) {
      done.append(`${member.activity} ${member.done}/${member.total}`, bar(member.done / member.total));
    } else if (member.failure) {
      done.append(member.failure);
    } else if (member.done) {
      done.append(member.state === "finished" ? `${member.done} steps` : `committed step ${member.done}`);
    }
    return row(
      cell(member.name), cell(element("span", member.state, `pill ${member.state}`)), cell(done, member.failure ? "failure" : ""),
      cell(member.loss === null ? "" : member.loss.toFixed(3), "number"),
      cell(member.tokens_per_s === null ? "" : Math.round(member.tokens_per_s).toLocaleString("en-US"), "number optional"),
      cell(member.attempt ? String(member.attempt) : "", "number optional"),
    );
  }));
  say("members-note", record.members.length < record.member_count
    ? `${record.members.length} of ${record.member_count} members, those at work first` : "");
}

function drawLists(record) {
  const workers = record.workers.map((worker) => row(
    cell(worker.name), cell(element("span", worker.state, `pill ${worker.state}`)), cell(worker.job), cell(worker.node || "–")));
  byId("workers").querySelector("tbody").replaceChildren(...workers);
  const waiting = record.queue.map((job) => {
    const item = element("li");
    const units = job.units.length > 4 ? `${job.units.slice(0, 3).join(", ")} and ${job.units.length - 3} more` : job.units.join(", ");
    item.append(element("span", job.job), element("span", units, "quiet"));
    return item;
  });
  const nothing = element("li", "nothing waits", "quiet");
  byId("queue").querySelector("ol").replaceChildren(...(waiting.length ? waiting : [nothing]));
  byId("queue-length").textContent = record.queue_length ? String(record.queue_length) : "";
  byId("events").querySelector("ol").replaceChildren(...[...record.events].reverse().map((event) => {
    const item = element("li"), time = element("time", moment(event.at));
    time.dateTime = new Date(event.at * 1000).toISOString();
    item.append(time, element("span", event.text, event.tone));
    return item;
  }));
  byId("news").hidden = !record.news.length;
  byId("news").querySelector("ol").replaceChildren(...[...record.news].reverse().map((text) => {
    const item = element("li");
    item.append(element("span", text));
    return item;
  }));
}

function drawResults(record) {
  byId("results").hidden = !record.scores.length;
  if (!record.scores.length) return;
  const names = Object.keys(record.scores[0].values);
  byId("results").querySelector("thead tr").replaceChildren(element("th", "set"), ...names.map((name) => element("th", name, "number")));
  byId("results").querySelector("tbody").replaceChildren(...record.scores.map((set) => row(
    cell(set.set), ...names.map((name) => cell(set.values[name] || "", "number")))));
}

function drawRun(record) {
  document.title = `${record.run} – raylora`;
  byId("name").textContent = record.run;
  byId("uri").textContent = record.uri;
  say("problem", record.problem || record.lifeless);
  if (!record.phase) return; // it could not be read once
  byId("run").hidden = false;
  const phase = byId("phase");
  phase.textContent = record.phase;
  phase.className = `pill ${record.lifeless ? "silent" : record.phase}`;
  phase.hidden = false;
  byId("headline").textContent = headline(record);
  byId("bar").hidden = false;
  byId("bar").firstElementChild.style.width = `${100 * record.share_done}%`;
  const links = [];
  if (record.has_report) links.push(link("Report", `/runs/${key}/report.html`));
  if (record.dashboard) links.push(link("Ray dashboard", record.dashboard));
  byId("links").replaceChildren(...links);
  drawResults(record);
  drawCurves(record);
  drawMembers(record);
  drawLists(record);
}

// --- all runs ---------------------------------------------------------------------------------------------------
function drawRuns(record) {
  byId("name").textContent = "raylora";
  byId("headline").textContent = `${record.runs.length} run${record.runs.length === 1 ? "" : "s"}`;
  byId("runs").hidden = false;
  byId("runs").querySelector("tbody").replaceChildren(...record.runs.map((run) => {
    const name = element("td");
    name.append(link(run.key.replace(":", " / "), `/runs/${encodeURIComponent(run.key)}/`));
    if (run.problem || run.lifeless) name.append(element("div", run.problem || run.lifeless, "bad"));
    if (!run.phase) return row(name, cell(""), cell(""), cell(""), cell("", "optional"));
    const done = element("div");
    done.append(run.eta_s && !run.lifeless ? `about ${duration(run.eta_s)} left` : run.is_over ? "" : `${Math.round(100 * run.share_done)} %`);
    if (!run.is_over) done.append(bar(run.share_done));
    return row(
      name, cell(element("span", run.phase, `pill ${run.lifeless ? "silent" : run.phase}`)),
      cell(`${run.members_done}/${run.member_count}`, "number"), cell(done),
      cell(run.updated_at ? moment(run.updated_at) : "", "optional"));
  }));
}

// --- the stream -------------------------------------------------------------------------------------------------
function draw() {
  if (latest === null) return;
  (key ? drawRun : drawRuns)(latest);
}

byId("metric").addEventListener("change", (event) => {
  chosen.metric = event.target.value;
  draw();
});
window.addEventListener("resize", draw);
byId("all").hidden = !key;
const source = new EventSource(key ? `/runs/${key}/events` : "/events");
source.onmessage = (event) => {
  latest = JSON.parse(event.data);
  byId("live").textContent = latest.is_over ? "" : "live";
  draw();
};
source.onerror = () => {
  byId("live").textContent = "connection lost; trying again …";
};
