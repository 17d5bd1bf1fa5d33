"use strict";
// From the board's plain data to the page. What comes out of the data becomes text nodes only, never markup.

const board = JSON.parse(document.getElementById("board").textContent);
const state = {
  table: 0, user: 0, metric: board.metric, sort: "metric", down: true, view: "one", // the table
  text: "", hidden: new Set(), // filters: wanted names, kinds left out
  cost: "seconds", depth: null, training: "", // what the charts show
};
const COSTS = {
  seconds: { label: "Time to train", axis: "time to train, seconds", show: duration },
  peak_memory_mb: { label: "Peak memory", axis: "peak memory, MB", show: memory },
  trainable: { label: "Trainable parameters", axis: "trainable parameters", show: count },
  tokens: { label: "Tokens read", axis: "tokens read", show: count },
  users_per_second: { label: "Users per second", axis: "users per second at inference", show: count },
};
const VIEWS = { one: "One metric in detail, with cost", all: "Every metric" };

// --- what is looked at ---------------------------------------------------------------------------------------------
const table = () => board.tables[state.table];
const measured = (row, metric = state.metric) => row.metrics[metric];
/** Whom the marks and the bold speak of. */
const judge = (one) => one.best_baseline ?? one.reference;
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
  const whose = protocol.group_by === "user" ? "each user's" : "all";
  if (protocol.kind === "RS") return `${shares} percent of ${whose} interactions to train, valid and test, ${order}`;
  if (protocol.kind === "TS") return `${shares} percent of all interactions, cut at two moments for everybody`;
  return JSON.stringify(protocol);
}
function candidateWords(one) {
  if (!one.evaluation) return "unknown";
  const items = one.split?.items ? `all ${exact(one.split.items)} items` : "all items";
  const excluded = one.evaluation.exclude_history;
  if (unknown(excluded)) return items;
  if (excluded === "recbole") return `${items}; what a user had already is excluded for general models only (RecBole's habit)`;
  if (!excluded) return `${items}, also those that the user had already`;
  return `${items} but those that the user had already, the same for every model`;
}
function inputWords(evaluation) {
  if (unknown(evaluation?.valid_rows_in_test_input)) return evaluation ? "not alike in all rows, see below" : "unknown";
  const phases = evaluation.valid_rows_in_test_input ? "train and valid" : "train";
  return `${phases} interactions${evaluation.refit_on_valid ? ", refitted on both" : ""}`;
}
/** What a row's evaluation does not share with the others'. */
function unlike(one) {
  const words = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const own = (row) => Object.entries(row.evaluation ?? {}).map(([key, value]) => `${key} ${words(value)}`).join(", ");
  return one.rows.filter((row) => own(row)).map((row) => `${row.name}: ${own(row)}`).join("; ");
}
function withheldWords(split) {
  const cold = split.cold_items ? `; ${several(split.cold_items, "item")} training never saw` : "";
  return `${several(split.withheld, "interaction")}${cold}`;
}
function lead(one) {
  const unit = one.evaluation?.eval_unit === "row" ? "test interactions" : "test users";
  const users = unknown(one.evaluation?.test_users) ? "" : ` over ${exact(one.evaluation.test_users)} ${unit}`;
  const agrees = metricsOf().some((metric) => metric.startsWith("consistency@"));
  return `${several(withFigures().length, "row")} on ${one.dataset}, one split for all: ${protocolWords(one.split)}. `
    + `Every figure is a mean${users}, then over the row's seeds; a higher one is better${agrees ? ", but for consistency" : ""}.`;
}
function bestWords(one) {
  const best = one.rows.find((row) => row.name === one.best_baseline);
  if (!best) return "none of the rows is a baseline with a figure on valid";
  const valid = figure(measured(best, board.metric)?.valid);
  return `${best.name}: of the baselines the highest ${title(board.metric)} on valid (${valid}); chosen without a look at test`;
}
const settingWords = (values) => Object.entries(values).map(([key, value]) =>
  `${key} ${typeof value === "string" ? value : JSON.stringify(value)}`).join(", ");
function choiceWords(row) {
  const { values, metric, seed, tried } = row.choice;
  const each = tried.map((one) => `${settingWords(one.values)}: ${unknown(one.valid) ? one.reason : figure(one.valid)}`);
  return `${row.name}: ${values ? settingWords(values) : "nothing"}, by ${title(metric)} on valid with seed ${seed} alone, `
    + `without a look at test (${each.join("; ")})`;
}
function facts(one) {
  const split = one.split ?? {}, mark = split.fingerprint;
  const sizes = ["train", "valid", "test"].filter((phase) => !unknown(split[phase]));
  const versions = Object.entries(board.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", ");
  const seeds = [...new Set(one.rows.flatMap((row) => row.seeds))].sort((a, b) => a - b);
  return [
    ["Data set", tableName(one)],
    ["Users and items", `${exact(split.users)} users, ${exact(split.items)} items`],
    ["Interactions", sizes.map((phase) => `${exact(split[phase])} ${phase}`).join(", ") || "unknown"],
    ["Repeats left out of valid and test", exact(split.dropped_repeats)],
    split.withheld ? ["Withheld from training", withheldWords(split)] : null,
    ["Candidates", candidateWords(one)],
    ["Inputs at test", inputWords(one.evaluation)],
    ["Seeds", seeds.join(", ") || "none"],
    ["Split's fingerprint", mark ? make("code", { title: mark }, `${mark.slice(0, 16)}…`) : "none"],
    ["Best baseline", bestWords(one), "wide"],
    ...one.rows.filter((row) => row.choice).map((row) => ["Chosen on valid", choiceWords(row), "wide"]),
    one.reference && one.reference !== one.best_baseline ? ["Also compared with", one.reference, "wide"] : null,
    unlike(one) ? ["Not alike in all rows", unlike(one), "wide"] : null,
    split.protocol ? ["Protocol in full", make("code", {}, JSON.stringify(split.protocol)), "wide"] : null,
    ["Command", make("code", {}, board.command), "wide"],
    ["Commit and versions", [make("code", {}, board.commit?.slice(0, 12) ?? "no commit"), ` ${versions}`], "wide"],
  ].filter(Boolean);
}
function renderMeasured() {
  const one = table();
  $("lead").textContent = lead(one);
  fill($("facts"), facts(one).map(([term, words, wide]) =>
    make("div", { class: wide ?? null }, make("dt", {}, term), make("dd", {}, words))));
}

// --- the table -----------------------------------------------------------------------------------------------------
function nameCell(row) {
  const one = table();
  const tag = (words, there) => (there ? make("span", { class: "tag" }, words) : null);
  return [row.name, make("span", { class: "small kind" }, kindSign(row.kind), ` ${row.kind} `,
    tag("best baseline", row.name === one.best_baseline), tag("reference", row.name === one.reference))];
}
/** In how many seeds a difference has its sign, and p over seeds; nothing for one seed. */
function seedWords(against) {
  if (against.seeds_both < 2) return "";
  const p = unknown(against.seeds_p) ? "" : `, over seeds ${probability(against.seeds_p)}`;
  return `; of this sign in ${against.seeds_alike} of ${against.seeds_both} seeds${p}`;
}
function seedsUnlike(against) {
  const unlike = against.mark && against.seeds_both > 1 && against.seeds_alike < against.seeds_both;
  return unlike ? `, ${against.seeds_alike} of ${against.seeds_both} seeds` : "";
}
function mark(against, name) {
  if (!against?.mark) return make("span", { class: "mark" });
  const up = against.mark === "+";
  const words = `${up ? "better" : "worse"} than ${name}: ${probability(against.p_adjusted)} after Holm's correction, `
    + `${probability(against.p)} before, Wilcoxon ${probability(against.wilcoxon_p)}${seedWords(against)}`;
  const shown = { class: `mark ${up ? "up" : "down"}`, role: "img", "aria-label": words, title: words };
  return make("span", shown, up ? "▲" : "▼");
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
  const value = measured(row, metric), best = judge(table());
  if (!value) return "–";
  const mean = make("span", { class: value.bold ? "value bold" : "value" }, figure(value.mean));
  const cell = [mean, mark(value.against?.[best], best)];
  if (!range) return cell;
  return [...cell, small(`${figure(value.low)} to ${figure(value.high)}`), whisker(value, range, row.kind)];
}
function againstCell(row, name) {
  return row.name === name ? small("itself") : testCell(measured(row)?.against?.[name], name);
}
function ownCell(row) {
  const own = measured(row)?.own;
  return own ? [...testCell(own, own.row), small(own.row)] : "–";
}
function testCell(against, name) {
  if (!against) return "–";
  const effect = unknown(against.effect) ? "–" : against.effect.toFixed(2);
  const words = `95 % interval of the difference ${signed(against.low)} to ${signed(against.high)}; Cohen's d ${effect}; `
    + `Wilcoxon ${probability(against.wilcoxon_p)}${seedWords(against)}`;
  return [make("span", { title: words }, signed(against.difference)), mark(against, name),
    small(`${percent(against.gain)}, ${probability(against.p_adjusted)}${seedsUnlike(against)}`)];
}
function intervalRange(metric) {
  const values = withFigures().map((row) => measured(row, metric)).filter(Boolean);
  return {
    low: Math.min(...values.map((value) => value.low ?? value.mean)),
    high: Math.max(...values.map((value) => value.high ?? value.mean)),
  };
}
/** Columns: key, label, what to sort by, what to show. */
function columns() {
  const name = { key: "name", label: "Model", by: (row) => row.name, show: nameCell };
  return [name, ...(state.view === "all" ? metricsOf().map(metricColumn) : detailColumns())];
}
function metricColumn(metric) {
  return {
    key: metric === state.metric ? "metric" : metric,
    label: title(metric),
    by: (row) => measured(row, metric)?.mean,
    show: (row) => meanCell(row, metric),
  };
}
function detailColumns() {
  const range = intervalRange(state.metric);
  const mean = metricColumn(state.metric);
  const std = {
    key: "std",
    label: "Std over seeds",
    by: (row) => measured(row)?.std,
    show: (row) => [figure(measured(row)?.std), small(several(row.seeds.length, "seed"))],
  };
  const against = [...new Set([table().best_baseline, table().reference])].filter(Boolean).map((other) => ({
    key: `against ${other}`,
    label: `Against ${other}, adjusted p`,
    by: (row) => measured(row)?.against?.[other]?.difference,
    show: (row) => againstCell(row, other),
  }));
  if (table().rows.some((row) => row.against)) against.push({
    key: "own",
    label: "Against its own base, adjusted p",
    by: (row) => measured(row)?.own?.difference,
    show: ownCell,
  });
  const told = Object.keys(COSTS).filter((key) => withFigures().some((row) => !unknown(row.cost?.[key])));
  const costs = told.map((key) => ({
    key,
    label: COSTS[key].label,
    by: (row) => row.cost?.[key],
    show: (row) => make("span", { title: exact(row.cost?.[key]) }, COSTS[key].show(row.cost?.[key])),
  }));
  const wide = { label: `${title(state.metric)} with 95 % interval`, show: (row) => meanCell(row, state.metric, range) };
  return [{ ...mean, ...wide }, std, ...against, ...costs];
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
  const button = make("button", { type: "button", "data-key": column.key, onclick: press },
    column.key === "name" ? [column.label, arrow] : [arrow, column.label]);
  const order = active ? (state.down ? "descending" : "ascending") : "none";
  return make("th", { scope: "col", class: column.key === "name" ? null : "number", "aria-sort": order }, button);
}
function renderRows() {
  const all = columns(), column = all.find((one) => one.key === state.sort) ?? all.find((one) => one.key === "metric") ?? all[0];
  const focused = document.activeElement?.dataset?.key;
  const lines = sorted(shown(), column).map((row) => make("tr", {}, all.map((one) => one.key === "name"
    ? make("th", { scope: "row" }, one.show(row)) : make("td", { class: "number" }, one.show(row)))));
  fill($("rows"), make("thead", {}, make("tr", {}, all.map(headerCell))), make("tbody", {}, lines));
  if (focused) [...$("rows").querySelectorAll("button")].find((button) => button.dataset.key === focused)?.focus();
  $("status").textContent = statusWords(lines.length, column);
  $("legend").textContent = legendWords(table());
}
function statusWords(shownRows, column) {
  if (!withFigures().length) return "No row has figures; the reasons stand below.";
  const order = column.key === "name" ? (state.down ? "from Z to A" : "from A to Z") : `${state.down ? "highest" : "lowest"} first`;
  return `${shownRows} of ${several(withFigures().length, "row")}, sorted by ${column.label}, ${order}.`;
}
/** How many rows are above their own base; a family of tests of its own. */
function ownWords() {
  const tests = withFigures().map((row) => measured(row)?.own).filter(Boolean);
  if (!tests.length) return "";
  const up = tests.filter((test) => test.mark === "+").length, above = tests.filter((test) => test.difference > 0).length;
  return ` Against its own base: ${above} of ${several(tests.length, "row")} above it, ${up} significantly, after Holm's correction `
    + `over these ${tests.length} alone.`;
}
function legendWords(one) {
  const best = judge(one);
  if (state.metric.startsWith("consistency@")) return "The share of a row's first items that its own teacher has among its first; "
    + "it says nothing of whether either is right, so it is not tested.";
  if (!best) return `No row to test against, so nothing is bold.${ownWords()}`;
  return `Bold: significantly better than ${best} (for ${best} itself: than every other row). ▲ better, ▼ worse than ${best} at `
    + `${board.alpha} after Holm's correction over ${several(one.tests, "test")}; the rest may be chance.${ownWords()}`;
}
/** A line a reason: the seeds that failed of it stand together. */
function reasonLines(row, key) {
  return [...new Set(row[key].map((one) => one.reason))].map((reason) => {
    const seeds = row[key].filter((one) => one.reason === reason && !unknown(one.seed)).map((one) => one.seed);
    const which = seeds.length ? `, seed${seeds.length > 1 ? "s" : ""} ${seeds.join(", ")}` : "";
    return make("li", {}, make("strong", {}, row.name), ` ${key}${which}: ${reason}`);
  });
}
function renderWithout() {
  const lines = ["failed", "refused"].flatMap((key) => table().rows.flatMap((row) => reasonLines(row, key)));
  fill($("without"), lines.length ? [make("h3", {}, "Failed and refused"), make("ul", { class: "without" }, lines)] : []);
}
function renderSettings() {
  const written = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const given = (row) => Object.entries(row.settings ?? {}).map(([key, value]) => `${key} = ${written(value)}`).join(", ");
  grid($("settings"), ["Row", "Model", "Seeds", "Parameters", "Settings given", "Runs"], table().rows.map((row) => [
    row.name, row.model, row.seeds.join(", ") || "–", exact(row.cost?.parameters), given(row) || "none, as shipped",
    row.runs.map((run) => make("code", { class: "small" }, run)),
  ]));
}
function renderPapers() {
  fill($("paper-figures"), table().papers.flatMap(renderPaper));
}
function renderPaper(paper) {
  const metrics = [...new Set(paper.rows.flatMap((row) => Object.keys(row.metrics)))];
  const cells = (value) => [figure(value?.paper), figure(value?.ours), percent(value?.deviation)];
  const list = (lines) => make("ul", {}, lines.map((line) => make("li", {}, line)));
  const headed = (words, lines) => (lines.length ? [make("h3", {}, words), list(lines)] : []);
  const figures = make("table", {});
  grid(figures, ["Model", ...metrics.flatMap((metric) => [`${title(metric)}, paper`, "ours", "deviation"])],
    paper.rows.map((row) => [row.name, ...metrics.flatMap((metric) => cells(row.metrics[metric]))]), "number");
  const gains = (paper.gains ?? []).map((gain) =>
    `${gain.name} over ${gain.over}, ${title(gain.metric)}: ${percent(gain.paper)} in the paper, ${percent(gain.ours)} here`);
  const rank = (name, value, p) => `${name} ${signed(value, 2)}, ${probability(p)}`;
  const orders = (paper.orders ?? []).map((one) => `${title(one.metric)}, ${one.systems} systems: `
    + `${rank("Spearman's rho", one.spearman, one.spearman_p)}; ${rank("Kendall's tau", one.kendall, one.kendall_p)}`);
  const missing = (paper.missing ?? []).map((one) => `${one.name}: ${one.why}`);
  const words = [paper.source, paper.note].filter(Boolean).join(". ");
  const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-label": `The figures of ${paper.source}, scrolls sideways` };
  return [make("p", {}, words), make("div", scroll, figures), ...headed("Gains", gains),
    ...headed("The order of the systems beside the paper's", orders), ...headed("Not run here", missing)];
}

// --- charts --------------------------------------------------------------------------------------------------------
function renderCost() {
  const cost = COSTS[state.cost], rows = shown().filter((row) => measured(row));
  const placed = rows.filter((row) => row.cost?.[state.cost] > 0);
  const points = placed.map((row) => {
    const value = measured(row), x = row.cost[state.cost];
    const words = `${title(state.metric)} ${figure(value.mean)}, ${cost.label.toLowerCase()} ${cost.show(x)}`;
    return { row, x, y: value.mean, low: value.low ?? value.mean, high: value.high ?? value.mean, words };
  });
  drawCost($("cost-plot"), points, { x: cost.axis, y: title(state.metric) });
  const rest = rows.filter((row) => !placed.includes(row)).map((row) => row.name);
  const side = state.cost === "users_per_second" ? "right is faster" : "left is cheaper";
  $("cost-words").textContent = `Up is better; ${side}. Bars are 95 % intervals; point at a mark for its figures.`;
  $("cost-note").textContent = rest.length ? `Not on this scale, as the cost is none or unknown: ${rest.join(", ")}.` : "";
}
function renderCurve() {
  const { curve } = table();
  $("curve-title").textContent = `Metrics over ${curve.setting}`;
  $("curve-words").textContent = `Rows of a line differ in ${curve.setting} alone. Bars are 95 % intervals of the mean over users, small dots `
    + `the seeds; the large open mark is what has the highest ${title(curve.metric)} on valid.`;
  const figures = curve.metrics.map((metric) => make("figure", {}, make("h3", {}, title(metric)),
    make("div", { class: "plot", role: "img" })));
  fill($("curve-plots"), figures);
  figures.forEach((one, place) => drawCurve(one.querySelector(".plot"), curve, curve.metrics[place]));
}
function renderDepth() {
  const measures = [...new Set(withFigures().flatMap((row) => Object.keys(row.at_k)))];
  const own = state.metric.split("@")[0];
  const chosen = measures.includes(state.depth) ? state.depth : measures.includes(own) ? own : measures[0];
  options($("depth-choice"), measures.map((measure) => [measure, title(measure)]), chosen);
  drawDepth($("depth-plot"), shown(), chosen, `${title(chosen)}@K`);
}
function renderGroups() {
  const figures = table().breakdowns.map((breakdown) => {
    const scrolls = { class: "wide-plot", tabindex: 0, role: "region", "aria-label": `By ${breakdown.name}, scrolls sideways` };
    return make("figure", {}, make("h3", {}, `By ${breakdown.name}`, small(`n: ${breakdown.unit} in the group`)),
      make("div", scrolls, make("div", { class: "plot", role: "img" })));
  });
  fill($("groups-plots"), figures);
  figures.forEach((one, place) => {
    const breakdown = table().breakdowns[place];
    drawGroups(one.querySelector(".plot"), breakdown, shown(), title(breakdown.metric));
  });
}
function renderTraining() {
  const trained = withFigures().filter((row) => row.curves.length);
  options($("training-choice"), [["", "all that are shown"], ...trained.map((row) => [row.name, row.name])], state.training);
  const rows = state.training ? trained.filter((row) => row.name === state.training) : shown().filter((row) => row.curves.length);
  const judged = [...new Set(rows.flatMap((row) => row.curves.map((curve) => curve.valid_metric)))];
  drawTraining($("loss-plot"), rows, "loss", "training loss", !state.training);
  const label = judged.length === 1 ? `${title(judged[0])} on valid` : "each model's metric on valid";
  drawTraining($("valid-plot"), rows, "valid", label, false);
}

// --- example users -------------------------------------------------------------------------------------------------
const itemName = (item) => item.title || `item ${item.item}`;
function items(list, marked) {
  const line = (item) => make("li", { class: marked(item) ? "target" : null, title: `item ${item.item}` }, itemName(item));
  return make("ol", {}, list.map(line));
}
function ranks(list) {
  const places = list.flatMap((item, place) => (item.hit ? [place + 1] : []));
  return places.length ? `target at rank ${places.join(", ")}` : `no target in the first ${list.length}`;
}
const panel = (heading, list, marked) => make("div", { class: "panel" }, make("h3", {}, heading), items(list, marked));
function renderUser() {
  const user = table().users[state.user];
  const lists = shown().filter((row) => user.top[row.name]).map((row) => {
    const list = user.top[row.name];
    return panel([kindSign(row.kind), ` ${row.name}`, small(ranks(list))], list, (item) => item.hit);
  });
  const own = make("div", {}, panel("Took next", user.targets, () => true),
    panel(["Had before", small("oldest first")], user.history, () => false));
  fill($("person"), make("div", { class: "person" }, own, make("div", { class: "lists" }, lists)));
}
function renderUsers() {
  const users = table().users;
  const found = ({ top }) => Object.values(top).filter((list) => list.some((item) => item.hit)).length;
  const words = (user) => `${user.user} (found by ${found(user)} of ${Object.keys(user.top).length})`;
  options($("user"), users.map((user, place) => [place, words(user)]), state.user);
  renderUser();
}

// --- the page ------------------------------------------------------------------------------------------------------
/** Sections that a table may lack: is it there, how is it drawn, what to say if not (null: nothing). */
const SECTIONS = {
  paper: [() => table().papers.length, renderPapers, "a paper's figures"],
  cost: [() => shownCosts().length, renderCost, "quality against cost"],
  curve: [() => table().curve, renderCurve, null], // most boards ask for none
  depth: [() => withFigures().some((row) => Object.keys(row.at_k).length), renderDepth, "curves over K"],
  groups: [() => table().breakdowns.length, renderGroups, "breakdowns"],
  training: [() => withFigures().some((row) => row.curves.length), renderTraining, "training curves"],
  examples: [() => table().users.length, renderUsers, "example users"],
};
const shownCosts = () => Object.keys(COSTS).filter((key) => withFigures().some((row) => row.cost?.[key] > 0));

function renderSections() {
  const absent = [];
  for (const [id, [there, render, words]] of Object.entries(SECTIONS)) {
    $(id).hidden = !there();
    if (there()) render();
    else if (words) absent.push(words);
  }
  $("left-out").textContent = absent.length ? `There is nothing to show here of: ${absent.join(", ")}.` : "";
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

addEventListener("beforeprint", () => fitPaper(document.querySelectorAll(".plot")));
addEventListener("afterprint", render);

$("made").textContent = `Made ${board.made.slice(0, 16).replace("T", " ")} UTC`;
$("how").textContent = "The interval beside a figure is the 95 % confidence interval of its mean over users, and the deviation "
  + "over seeds says how far training alone moves it. Rows are compared user by user (seeds averaged first) by a paired test, and "
  + "the p-values of one metric are adjusted together by Holm's method, so that a long table brings no more false finds than a "
  + `short one: only what stays below ${board.alpha} is marked, and bold. A small p-value says that a difference is there, not that `
  + "it is large: for that read the difference itself, its interval and Cohen's d (point at the difference).";
// A phone shows the table first.
$("facts-fold").open = matchMedia("(min-width: 48rem)").matches;
restore();
