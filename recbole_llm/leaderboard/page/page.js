"use strict";
// From the board's plain data to the page. What comes out of the data becomes text nodes only, never markup.

const board = JSON.parse(document.getElementById("board").textContent);
const $ = (id) => document.getElementById(id);
const state = { table: 0, metric: board.metric, sort: "metric", down: true, view: "one", text: "", hidden: new Set(), cost: "seconds", depth: null, training: "", user: 0 };
const COSTS = {
  seconds: { label: "Time to train", axis: "time to train, seconds", show: duration },
  peak_memory_mb: { label: "Peak memory", axis: "peak memory, MB", show: memory },
  trainable: { label: "Trainable parameters", axis: "trainable parameters", show: count },
  tokens: { label: "Tokens read", axis: "tokens read", show: count },
  users_per_second: { label: "Users per second", axis: "users per second at inference", show: count },
};
const VIEWS = { one: "One metric in detail, with cost", all: "Every metric" };

// --- small tools ---------------------------------------------------------------------------------------------------
/** An element; strings among the children become text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== ""));
  return node;
}
const fill = (node, ...children) => node.replaceChildren(...children.flat().filter((child) => child !== null && child !== ""));
const unknown = (value) => value === null || value === undefined;
function figure(value) { return unknown(value) ? "–" : value.toFixed(4); }
function signed(value) { return unknown(value) ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4); }
function percent(value) { return unknown(value) ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value * 100).toFixed(1)} %`; }
function probability(value) { return unknown(value) ? "p –" : value < 0.001 ? "p < 0.001" : `p = ${value.toFixed(3)}`; }
function count(value) { return unknown(value) ? "–" : value.toLocaleString("en", value < 10000 ? { maximumFractionDigits: 0 } : { notation: "compact", maximumSignificantDigits: 3 }); }
function exact(value) { return unknown(value) ? "unknown" : value.toLocaleString("en"); }
function memory(value) { return unknown(value) ? "–" : value < 1024 ? `${value.toFixed(0)} MB` : `${(value / 1024).toFixed(1)} GB`; }
function duration(value) {
  if (unknown(value)) return "–";
  if (value < 60) return `${value < 10 ? value.toFixed(1) : value.toFixed(0)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(value % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
/** A metric's name as the field writes it. */
function title(metric) {
  const [stem, k] = metric.split("@");
  const written = ["ndcg", "mrr", "map", "auc"].includes(stem) ? stem.toUpperCase() : stem[0].toUpperCase() + stem.slice(1);
  return k ? `${written}@${k}` : written;
}
const several = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
function kindSign(kind) { return make("span", { class: `shape ${kindName(kind)}`, "aria-hidden": "true" }, KINDS[kindName(kind)].sign); }
function options(select, entries, chosen) {
  fill(select, entries.map(([value, words]) => make("option", { value, selected: String(value) === String(chosen) ? "" : null }, words)));
}
/** A plain table; `kind` is the class of all columns but the first. */
function grid(node, head, lines, kind = null) {
  const column = (words, place) => make("th", { scope: "col", class: place ? kind : null }, words);
  const cell = (words, place) => (place ? make("td", { class: kind }, words) : make("th", { scope: "row" }, words));
  fill(node, make("thead", {}, make("tr", {}, head.map(column))), make("tbody", {}, lines.map((line) => make("tr", {}, line.map(cell)))));
}

// --- what is looked at ---------------------------------------------------------------------------------------------
const table = () => board.tables[state.table];
const measured = (row, metric = state.metric) => row.metrics[metric];
const withFigures = () => table().rows.filter((row) => Object.keys(row.metrics).length);
function metricsOf() { return board.metrics.filter((metric) => withFigures().some((row) => measured(row, metric))); }
function tableName(one) { return [one.dataset, one.protocol, one.column].filter(Boolean).join(" · "); }

/** Rows that pass the filters; names are separated by commas, any of them will do. */
function shown() {
  const wanted = state.text.toLowerCase().split(",").map((word) => word.trim()).filter(Boolean);
  const named = (row) => !wanted.length || wanted.some((word) => row.name.toLowerCase().includes(word));
  return withFigures().filter((row) => !state.hidden.has(kindName(row.kind)) && named(row));
}

// --- what was measured ---------------------------------------------------------------------------------------------
function protocolWords(split) {
  const protocol = split?.protocol;
  if (!protocol) return "a split that the runs do not tell";
  const shares = (protocol.ratios ?? []).map((share) => `${+(share * 100).toFixed(1)}`).join(" / ");
  const order = protocol.order === "random" ? "at random" : "by time";
  if (protocol.kind === "LS") return protocol.order === "random"
    ? `leave-one-out at random (${protocol.leave_one_mode})`
    : `leave-one-out by time: each user's last interactions are held out (${protocol.leave_one_mode.replaceAll("_", " ")})`;
  if (protocol.kind === "RS") return `${shares} percent of ${protocol.group_by === "user" ? "each user's" : "all"} interactions to train, valid and test, ${order}`;
  if (protocol.kind === "TS") return `${shares} percent of all interactions to train, valid and test, cut at two moments for everybody`;
  return JSON.stringify(protocol);
}
function candidateWords(one) {
  if (!one.evaluation) return "unknown";
  const items = one.split?.items ? `all ${exact(one.split.items)} items` : "all items";
  const excluded = one.evaluation.exclude_history;
  if (excluded === "recbole") return `${items}; what a user had already is excluded for general models only (RecBole's habit)`;
  return excluded ? `${items} but those that the user had already, the same for every model` : `${items}, also those that the user had already`;
}
function lead(one) {
  const unit = one.evaluation?.eval_unit === "row" ? "test interactions" : "test users";
  const users = unknown(one.evaluation?.test_users) ? "" : ` over ${exact(one.evaluation.test_users)} ${unit}`;
  return `${several(withFigures().length, "row")} on ${one.dataset}, one split for all: ${protocolWords(one.split)}. `
    + `Every figure is a mean${users}, then over the row's seeds; a higher one is better.`;
}
function bestWords(one) {
  const best = one.rows.find((row) => row.name === one.best_baseline);
  if (!best) return "none of the rows is a baseline with a figure on valid";
  return `${best.name}: of the baselines the highest ${title(board.metric)} on valid (${figure(measured(best, board.metric)?.valid)}); chosen without a look at test`;
}
function facts(one) {
  const split = one.split ?? {}, sizes = ["train", "valid", "test"].filter((phase) => !unknown(split[phase]));
  const seeds = [...new Set(one.rows.flatMap((row) => row.seeds))].sort((a, b) => a - b);
  return [
    ["Data set", tableName(one)],
    ["Users and items", `${exact(split.users)} users, ${exact(split.items)} items`],
    ["Interactions", sizes.map((phase) => `${exact(split[phase])} ${phase}`).join(", ") || "unknown"],
    ["Repeats left out of valid and test", exact(split.dropped_repeats)],
    ["Candidates", candidateWords(one)],
    ["Inputs at test", unknown(one.evaluation?.valid_rows_in_test_input) ? "unknown" : `${one.evaluation.valid_rows_in_test_input ? "train and valid" : "train"} interactions${one.evaluation.refit_on_valid ? ", refitted on both" : ""}`],
    ["Seeds", seeds.join(", ") || "none"],
    ["Split's fingerprint", split.fingerprint ? make("code", { title: split.fingerprint }, `${split.fingerprint.slice(0, 16)}…`) : "none"],
    ["Best baseline", bestWords(one), "wide"],
    one.reference && one.reference !== one.best_baseline ? ["Also compared with", one.reference, "wide"] : null,
    split.protocol ? ["Protocol in full", make("code", {}, JSON.stringify(split.protocol)), "wide"] : null,
    ["Command", make("code", {}, board.command), "wide"],
    ["Commit and versions", [make("code", {}, board.commit ? board.commit.slice(0, 12) : "no commit"), ` ${Object.entries(board.versions).map(([name, version]) => `${name} ${version}`).join(", ")}`], "wide"],
  ].filter(Boolean);
}
function renderMeasured() {
  const one = table();
  $("lead").textContent = lead(one);
  fill($("facts"), facts(one).map(([term, words, wide]) => make("div", { class: wide ?? null }, make("dt", {}, term), make("dd", {}, words))));
}

// --- the table -----------------------------------------------------------------------------------------------------
function nameCell(row) {
  const one = table();
  const tags = [row.name === one.best_baseline ? "best baseline" : null, row.name === one.reference ? "reference" : null].filter(Boolean);
  return [row.name, make("span", { class: "small kind" }, kindSign(row.kind), ` ${row.kind} `, tags.map((tag) => make("span", { class: "tag" }, tag)))];
}
function mark(against, name) {
  if (!against?.mark) return make("span", { class: "mark" });
  const up = against.mark === "+";
  const words = `${up ? "better" : "worse"} than ${name}: ${probability(against.p_adjusted)} after Holm's correction, ${probability(against.p)} before, Wilcoxon ${probability(against.wilcoxon_p)}`;
  return make("span", { class: `mark ${up ? "up" : "down"}`, role: "img", "aria-label": words, title: words }, up ? "▲" : "▼");
}
function whisker(value, range, kind) {
  if (unknown(value.low) || unknown(value.high)) return null;
  const at = (number) => `${(100 * (number - range.low)) / (range.high - range.low || 1)}%`;
  const line = make("i"), point = make("b");
  line.style.left = at(value.low);
  line.style.right = `calc(100% - ${at(value.high)})`;
  point.style.left = at(value.mean);
  return make("span", { class: `whisker ${kindName(kind)}`, "aria-hidden": "true" }, line, point);
}
function meanCell(row, metric, range) {
  const value = measured(row, metric), best = table().best_baseline;
  if (!value) return "–";
  const cell = [make("span", { class: value.bold ? "value bold" : "value" }, figure(value.mean)), mark(value.against?.[best], best)];
  if (!range) return cell;
  return [...cell, make("span", { class: "small" }, `${figure(value.low)} to ${figure(value.high)}`), whisker(value, range, row.kind)];
}
function againstCell(row, name) {
  if (row.name === name) return make("span", { class: "small" }, "itself");
  const against = measured(row)?.against?.[name];
  if (!against) return "–";
  const words = `95 % interval of the difference ${signed(against.low)} to ${signed(against.high)}; Cohen's d ${unknown(against.effect) ? "–" : against.effect.toFixed(2)}; Wilcoxon ${probability(against.wilcoxon_p)}`;
  return [make("span", { title: words }, signed(against.difference)), mark(against, name), make("span", { class: "small" }, `${percent(against.gain)}, ${probability(against.p_adjusted)}`)];
}
function intervalRange(metric) {
  const values = withFigures().map((row) => measured(row, metric)).filter(Boolean);
  return { low: Math.min(...values.map((value) => value.low ?? value.mean)), high: Math.max(...values.map((value) => value.high ?? value.mean)) };
}
/** Columns: key, label, what to sort by, what to show. */
function columns() {
  const name = { key: "name", label: "Model", by: (row) => row.name, show: nameCell };
  if (state.view === "all") {
    return [name, ...metricsOf().map((metric) => ({ key: metric === state.metric ? "metric" : metric, label: title(metric), by: (row) => measured(row, metric)?.mean, show: (row) => meanCell(row, metric) }))];
  }
  const one = table(), range = intervalRange(state.metric);
  const others = [...new Set([one.best_baseline, one.reference])].filter(Boolean);
  const costs = Object.entries(COSTS).filter(([key]) => withFigures().some((row) => !unknown(row.cost?.[key])));
  return [
    name,
    { key: "metric", label: `${title(state.metric)} with 95 % interval`, by: (row) => measured(row)?.mean, show: (row) => meanCell(row, state.metric, range) },
    { key: "std", label: "Std over seeds", by: (row) => measured(row)?.std, show: (row) => [figure(measured(row)?.std), make("span", { class: "small" }, several(row.seeds.length, "seed"))] },
    ...others.map((other) => ({ key: `against ${other}`, label: `Against ${other}, adjusted p`, by: (row) => measured(row)?.against?.[other]?.difference, show: (row) => againstCell(row, other) })),
    ...costs.map(([key, cost]) => ({ key, label: cost.label, by: (row) => row.cost?.[key], show: (row) => make("span", { title: exact(row.cost?.[key]) }, cost.show(row.cost?.[key])) })),
  ];
}
/** What is unknown stands last, either way. */
function sorted(rows, column) {
  const sign = state.down ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [x, y] = [column.by(a), column.by(b)];
    if (unknown(x) || unknown(y)) return unknown(x) - unknown(y);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  });
}
function headerCell(column) {
  const active = column.key === state.sort;
  const arrow = make("span", { class: "arrow", "aria-hidden": "true" }, active ? (state.down ? "↓" : "↑") : "");
  const press = () => update({ sort: column.key, down: active ? !state.down : column.key !== "name" });
  return make("th", { scope: "col", class: column.key === "name" ? null : "number", "aria-sort": active ? (state.down ? "descending" : "ascending") : "none" },
    make("button", { type: "button", "data-key": column.key, onclick: press }, column.key === "name" ? [column.label, arrow] : [arrow, column.label]));
}
function renderRows() {
  const all = columns(), column = all.find((one) => one.key === state.sort) ?? all.find((one) => one.key === "metric") ?? all[0];
  const focused = document.activeElement?.dataset?.key;
  const lines = sorted(shown(), column).map((row) => make("tr", {}, all.map((one) => one.key === "name"
    ? make("th", { scope: "row" }, one.show(row)) : make("td", { class: "number" }, one.show(row)))));
  fill($("rows"), make("thead", {}, make("tr", {}, all.map(headerCell))), make("tbody", {}, lines));
  if (focused) [...$("rows").querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
  if (!withFigures().length) $("status").textContent = "No row has figures; the reasons stand below.";
  else $("status").textContent = `${lines.length} of ${several(withFigures().length, "row")}, sorted by ${column.label}, ${state.down ? "highest" : "lowest"} first.`;
  $("legend").textContent = table().best_baseline ? `Bold: significant. ▲ better, ▼ worse than ${table().best_baseline} at ${board.alpha} after Holm's correction over ${several(table().tests, "test")}; the rest may be chance.` : "No baseline to test against, so nothing is bold.";
}
function renderWithout() {
  const lines = ["failed", "refused"].flatMap((key) => table().rows.flatMap((row) => [...new Set(row[key].map((one) => one.reason))].map((reason) => {
    const seeds = row[key].filter((one) => one.reason === reason && !unknown(one.seed)).map((one) => one.seed);
    return make("li", {}, make("strong", {}, row.name), ` ${key}${seeds.length ? `, seed${seeds.length > 1 ? "s" : ""} ${seeds.join(", ")}` : ""}: ${reason}`);
  })));
  fill($("without"), lines.length ? [make("h3", {}, "Failed and refused"), make("ul", { class: "without" }, lines)] : []);
}
function renderSettings() {
  const pairs = (row) => Object.entries(row.settings ?? {}).map(([key, value]) => `${key} = ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
  grid($("settings"), ["Row", "Model", "Seeds", "Parameters", "Settings given", "Runs"], table().rows.map((row) =>
    [row.name, row.model, row.seeds.join(", ") || "–", exact(row.cost?.parameters), pairs(row) || "the shipped ones", row.runs.map((run) => make("code", { class: "small" }, run))]));
}
function renderPaper() {
  const paper = table().paper;
  if (!paper) return;
  const metrics = [...new Set(paper.rows.flatMap((row) => Object.keys(row.metrics)))];
  $("paper-source").textContent = [paper.source, paper.note].filter(Boolean).join(". ");
  grid($("paper-rows"), ["Model", ...metrics.flatMap((metric) => [`${title(metric)}, paper`, "ours", "deviation"])], paper.rows.map((row) =>
    [row.name, ...metrics.flatMap((metric) => [figure(row.metrics[metric]?.paper), figure(row.metrics[metric]?.ours), percent(row.metrics[metric]?.deviation)])]), "number");
  const gains = (paper.gains ?? []).map((gain) => make("li", {}, `${gain.name} over ${gain.over}, ${title(gain.metric)}: ${percent(gain.paper)} in the paper, ${percent(gain.ours)} here`));
  const missing = (paper.missing ?? []).map((one) => make("li", {}, `${one.name}: ${one.why}`));
  fill($("paper-more"), gains.length ? [make("h3", {}, "Gains"), make("ul", {}, gains)] : [], missing.length ? [make("h3", {}, "Not run here"), make("ul", {}, missing)] : []);
}

// --- charts --------------------------------------------------------------------------------------------------------
function renderCost() {
  const cost = COSTS[state.cost], rows = shown().filter((row) => measured(row));
  const placed = rows.filter((row) => row.cost?.[state.cost] > 0);
  const points = placed.map((row) => ({ row, x: row.cost[state.cost], y: measured(row).mean, low: measured(row).low ?? measured(row).mean, high: measured(row).high ?? measured(row).mean, words: `${title(state.metric)} ${figure(measured(row).mean)}, ${cost.label.toLowerCase()} ${cost.show(row.cost[state.cost])}` }));
  drawCost($("cost-plot"), points, { x: cost.axis, y: title(state.metric) });
  const rest = rows.filter((row) => !placed.includes(row)).map((row) => row.name);
  $("cost-words").textContent = `Up is better; ${state.cost === "users_per_second" ? "right is faster" : "left is cheaper"}. Bars are 95 % intervals; point at a mark for its figures.`;
  $("cost-note").textContent = rest.length ? `Not on this scale, as the cost is none or unknown: ${rest.join(", ")}.` : "";
}
function renderDepth() {
  const measures = [...new Set(withFigures().flatMap((row) => Object.keys(row.at_k)))];
  const own = state.metric.split("@")[0];
  const chosen = measures.includes(state.depth) ? state.depth : measures.includes(own) ? own : measures[0];
  options($("depth-choice"), measures.map((measure) => [measure, title(measure)]), chosen);
  drawDepth($("depth-plot"), shown(), chosen, `${title(chosen)}@K`);
}
function renderGroups() {
  fill($("groups-plots"), table().breakdowns.map((breakdown) => make("figure", {}, make("h3", {}, `By ${breakdown.name}`, make("span", { class: "small" }, `n: ${breakdown.unit} in the group`)), make("div", { class: "wide-plot", tabindex: 0, role: "region", "aria-label": `By ${breakdown.name}, scrolls sideways` }, make("div", { class: "plot", role: "img" })))));
  [...$("groups-plots").querySelectorAll(".plot")].forEach((plot, place) => {
    const breakdown = table().breakdowns[place];
    drawGroups(plot, breakdown, shown(), title(breakdown.metric));
  });
}
function renderTraining() {
  const trained = withFigures().filter((row) => row.curves.length);
  options($("training-choice"), [["", "all that are shown"], ...trained.map((row) => [row.name, row.name])], state.training);
  const rows = state.training ? trained.filter((row) => row.name === state.training) : shown().filter((row) => row.curves.length);
  const judged = [...new Set(rows.flatMap((row) => row.curves.map((curve) => curve.valid_metric)))];
  drawTraining($("loss-plot"), rows, "loss", "training loss", !state.training);
  drawTraining($("valid-plot"), rows, "valid", judged.length === 1 ? `${title(judged[0])} on valid` : "each model's metric on valid", false);
}

// --- example users -------------------------------------------------------------------------------------------------
const itemName = (item) => item.title || `item ${item.item}`;
function items(list, marked) {
  return make("ol", {}, list.map((item) => make("li", { class: marked(item) ? "target" : null, title: `item ${item.item}` }, itemName(item))));
}
function ranks(list) {
  const places = list.flatMap((item, place) => (item.hit ? [place + 1] : []));
  return places.length ? `target at rank ${places.join(", ")}` : `no target in the first ${list.length}`;
}
function renderUser() {
  const user = table().users[state.user];
  const lists = shown().filter((row) => user.top[row.name]).map((row) => make("div", { class: "panel" },
    make("h3", {}, kindSign(row.kind), ` ${row.name}`, make("span", { class: "small" }, ranks(user.top[row.name]))), items(user.top[row.name], (item) => item.hit)));
  fill($("person"), make("div", { class: "person" },
    make("div", {},
      make("div", { class: "panel" }, make("h3", {}, "Took next"), items(user.targets, () => true)),
      make("div", { class: "panel" }, make("h3", {}, "Had before", make("span", { class: "small" }, "oldest first")), items(user.history, () => false))),
    make("div", { class: "lists" }, lists)));
}
function renderUsers() {
  const users = table().users;
  const hits = (user) => Object.values(user.top).filter((list) => list.some((item) => item.hit)).length;
  options($("user"), users.map((user, place) => [place, `${user.user} (found by ${hits(user)} of ${Object.keys(user.top).length})`]), state.user);
  renderUser();
}

// --- the page ------------------------------------------------------------------------------------------------------
/** Sections that a table may lack: is it there, how is it drawn, what to say if not. */
const SECTIONS = {
  paper: [() => table().paper, renderPaper, "a paper's figures (this is no paper's suite)"],
  cost: [() => shownCosts().length, renderCost, "quality against cost (no run tells its cost)"],
  depth: [() => withFigures().some((row) => Object.keys(row.at_k).length), renderDepth, "curves over K (no run kept its rankings)"],
  groups: [() => table().breakdowns.length, renderGroups, "breakdowns (no run kept its rankings)"],
  training: [() => withFigures().some((row) => row.curves.length), renderTraining, "training curves (no run kept any)"],
  examples: [() => table().users.length, renderUsers, "example users (no run kept its rankings)"],
};
const shownCosts = () => Object.keys(COSTS).filter((key) => withFigures().some((row) => row.cost?.[key] > 0));

function renderSections() {
  const absent = [];
  for (const [id, [there, render, words]] of Object.entries(SECTIONS)) {
    $(id).hidden = !there();
    if (there()) render();
    else absent.push(words);
  }
  $("left-out").textContent = absent.length ? `Not in this table: ${absent.join("; ")}.` : "";
}
function renderControls() {
  table().rows.forEach((row, place) => { row.place = place; });
  $("table-choice").hidden = board.tables.length < 2;
  options($("table"), board.tables.map((one, place) => [place, tableName(one)]), state.table);
  options($("metric"), metricsOf().map((metric) => [metric, title(metric)]), state.metric);
  options($("cost-choice"), shownCosts().map((key) => [key, COSTS[key].label]), state.cost);
  $("text").value = state.text;
  const kinds = [...new Set(table().rows.map((row) => kindName(row.kind)))];
  fill($("kinds"), make("legend", { class: "hidden" }, "Kinds"), kinds.map((kind) => {
    const box = make("input", { type: "checkbox", value: kind, checked: state.hidden.has(kind) ? null : "" });
    box.addEventListener("change", () => { state.hidden[box.checked ? "delete" : "add"](kind); update({}); });
    return make("label", {}, box, kindSign(kind), kind);
  }));
  fill($("view"), make("legend", { class: "hidden" }, "Columns"), Object.entries(VIEWS).map(([view, words]) => {
    const radio = make("input", { type: "radio", name: "view", value: view, checked: state.view === view ? "" : null });
    radio.addEventListener("change", () => update({ view }));
    return make("label", {}, radio, words);
  }));
}
function render() {
  renderRows();
  renderSections();
}
/** Another table: everything that depends on it starts anew. */
function open(place) {
  Object.assign(state, { table: board.tables[place] ? place : 0, user: 0, training: "", hidden: new Set() });
  if (!metricsOf().includes(state.metric)) state.metric = metricsOf()[0] ?? board.metric;
  if (!shownCosts().includes(state.cost)) state.cost = shownCosts()[0] ?? "seconds";
  renderControls();
  renderMeasured();
  renderWithout();
  renderSettings();
  render();
}
/** The address keeps what is looked at, so that it can be sent to somebody. */
function update(change, pause = 0) {
  Object.assign(state, change);
  const kept = { table: state.table, metric: state.metric, sort: state.sort, down: state.down ? 1 : 0, view: state.view };
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  renderRows();
  // The charts take longer than the next letter.
  clearTimeout(waiting);
  waiting = setTimeout(renderSections, pause);
}
let waiting = 0;
function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const key of ["metric", "sort"]) if (kept.get(key)) state[key] = kept.get(key);
  if (kept.get("view") in VIEWS) state.view = kept.get("view");
  if (kept.has("down")) state.down = kept.get("down") === "1";
  open(Number(kept.get("table")) || 0);
}
const on = (id, act, event = "change") => $(id).addEventListener(event, (happened) => act(happened.target.value));
on("table", (value) => { open(Number(value)); update({ sort: "metric", down: true }); });
on("metric", (metric) => update({ metric, sort: "metric", down: true }));
on("text", (text) => update({ text }, 250), "input");
on("cost-choice", (cost) => { state.cost = cost; renderCost(); });
on("depth-choice", (depth) => { state.depth = depth; renderDepth(); });
on("training-choice", (training) => { state.training = training; renderTraining(); });
on("user", (user) => { state.user = Number(user); renderUser(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);

$("made").textContent = `Made ${board.made.slice(0, 16).replace("T", " ")} UTC`;
$("how").textContent = `The interval beside a figure is the 95 % confidence interval of its mean over users, and the deviation over seeds says how far training alone moves it. `
  + `Rows are compared user by user (seeds averaged first) by a paired test, and the p-values of one metric are adjusted together by Holm's method, so that a long table brings no more false finds than a short one: only what stays below ${board.alpha} is marked, and bold. `
  + `A small p-value says that a difference is there, not that it is large: for that read the difference itself, its interval and Cohen's d (point at the difference).`;
// A phone shows the table first.
$("facts-fold").open = matchMedia("(min-width: 48rem)").matches;
restore();
