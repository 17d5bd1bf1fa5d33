"use strict";
// The page's charts, drawn by plotly. A kind of model has a shape and a colour of its own; so has every row.

const KINDS = {
  general: { sign: "●", symbol: "circle", dash: "dot" },
  sequential: { sign: "■", symbol: "square", dash: "dash" },
  language: { sign: "◆", symbol: "diamond", dash: "solid" },
  other: { sign: "▲", symbol: "triangle-up", dash: "dashdot" },
};
const ROW_COLOURS = 8;
const ROW_SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x", "star"];

// Pixels: plots narrower than this are a phone's; a printed page's width; what axes and titles need around a plot.
const NARROW = 560;
const PAPER = 960;
const LEGEND = { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0.5, xanchor: "center" };
const MARGIN = { l: 62, r: 16, t: 28, b: 48 };

const kindName = (kind) => (kind in KINDS ? kind : "other");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Text that plotly shows letter by letter: it reads a small HTML of its own in every label. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

/** How a row's line looks; its place in the whole table decides, so a filter changes nobody's colour. */
function rowStyle(row) {
  const round = Math.floor(row.place / ROW_COLOURS);
  return {
    color: colour(`row-${row.place % ROW_COLOURS}`),
    symbol: ROW_SYMBOLS[(row.place + round) % ROW_SYMBOLS.length],
    pattern: ["", ".", "x", "-"][round % 4],
    dash: KINDS[kindName(row.kind)].dash,
  };
}

function draw(plot, traces, layout, description) {
  const narrow = plot.clientWidth < NARROW;
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 13, color: colour("ink") },
    margin: MARGIN,
    legend: LEGEND,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("ink") },
    hoverlabel: { align: "left" },
    hovermode: "closest",
    // A finger that scrolls the page must not zoom into a chart.
    dragmode: narrow ? false : "zoom",
    showlegend: true,
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
  plot.setAttribute("aria-label", description);
  // These two buttons only: some of the others open plotly's own site.
  Plotly.react(plot, traces, base, { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]] });
}

/** As wide as a printed page, as a drawn chart does not shrink; drawing anew undoes it. */
function fitPaper(plots) {
  for (const plot of plots) {
    if (plot.data) Plotly.relayout(plot, { width: plot.closest(".pair") ? PAPER / 2 - 10 : PAPER });
  }
}

/** A range somewhat wider than its values. */
function roomy(values, share) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || 1) * share;
  return [low - room, high + room];
}

/** Marks of a log axis: powers of ten, with 2 and 5 between them where there would be few. */
function logTicks([low, high]) {
  const steps = high - low < 2.5 ? [1, 2, 5] : [1];
  const values = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    const marks = steps.map((step) => step * 10 ** power);
    values.push(...marks.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high));
  }
  const words = (value) => value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 2 });
  return { tickvals: values, ticktext: values.map(words) };
}

/**
 * Where each point's name stands, so that it covers as few points, intervals and names as can be; "" where a phone has
 * no room for it.
 * Boxes are [left, top, right, bottom] in pixels.
 */
function labelPlaces(plot, points, xRange, yRange) {
  const width = plot.clientWidth - MARGIN.l - MARGIN.r, height = plot.clientHeight - MARGIN.t - MARGIN.b - 60;
  const across = (x) => ((Math.log10(x) - xRange[0]) / (xRange[1] - xRange[0])) * width;
  const down = (y) => ((yRange[1] - y) / (yRange[1] - yRange[0])) * height;
  const taken = points.flatMap((point) => {
    const x = across(point.x), y = down(point.y);
    return [[x - 8, y - 8, x + 8, y + 8], [x - 4, down(point.high), x + 4, down(point.low)]];
  });
  const clash = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  return points.map((point) => {
    const x = across(point.x), y = down(point.y), long = point.row.name.length * 7.2;
    const boxes = {
      "middle right": [x + 9, y - 9, x + 18 + long, y + 9],
      "middle left": [x - 18 - long, y - 9, x - 9, y + 9],
      "top right": [x + 5, y - 25, x + 14 + long, y - 8],
      "bottom right": [x + 5, y + 8, x + 14 + long, y + 25],
      "top left": [x - 14 - long, y - 25, x - 5, y - 8],
      "bottom left": [x - 14 - long, y + 8, x - 5, y + 25],
    };
    const outside = (box) => (box[0] <= 0 || box[2] >= width + MARGIN.r ? 9 : 0);
    const clashes = (box) => taken.filter((other) => clash(box, other)).length + outside(box);
    const best = Object.keys(boxes).reduce((one, other) => (clashes(boxes[other]) < clashes(boxes[one]) ? other : one));
    if (clashes(boxes[best]) && plot.clientWidth < NARROW) return "";
    taken.push(boxes[best]);
    return best;
  });
}

/** Quality over a cost on a log scale; a trace a kind. Points: {row, x, y, low, high, words}. */
function drawCost(plot, points, labels) {
  const xRange = roomy(points.map((point) => Math.log10(point.x)), 0.06);
  const yRange = roomy(points.flatMap((point) => [point.low, point.high]), 0.06);
  const places = labelPlaces(plot, points, xRange, yRange);
  const traces = [...new Set(points.map((point) => kindName(point.row.kind)))].map((kind) => {
    const placed = points.map((point, place) => ({ ...point, place: places[place] }));
    const at = placed.filter((point) => kindName(point.row.kind) === kind);
    return {
      type: "scatter",
      mode: "markers+text",
      name: kind,
      x: at.map((point) => point.x),
      y: at.map((point) => point.y),
      text: at.map((point) => (point.place ? `\u2002${plain(point.row.name)}\u2002` : "")),
      textposition: at.map((point) => point.place || "middle right"),
      cliponaxis: false,
      customdata: at.map((point) => [plain(point.row.name), plain(point.words)]),
      hovertemplate: "<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>",
      marker: { symbol: KINDS[kind].symbol, size: 12, color: colour(kind) },
      error_y: {
        type: "data", symmetric: false, thickness: 1.2, width: 4, color: colour(kind),
        array: at.map((point) => point.high - point.y),
        arrayminus: at.map((point) => point.y - point.low),
      },
    };
  });
  draw(plot, traces, {
    xaxis: { title: { text: plain(labels.x) }, type: "log", range: xRange, ...logTicks(xRange) },
    yaxis: { title: { text: plain(labels.y) }, range: yRange },
  }, `${labels.y} of every model against ${labels.x}`);
}

/** A metric over a setting, a line for rows that differ in nothing else; means with intervals, seeds as small marks. */
function drawCurve(plot, curve, metric) {
  // A little beside each other, or their bars would lie on one another.
  const step = 0.008 * (curve.ticks[curve.ticks.length - 1].at - curve.ticks[0].at);
  const gap = (value, end) => Math.abs((value[end] ?? value.mean) - value.mean);
  const traces = curve.lines.flatMap((line, place) => {
    const at = line.points.filter((point) => point.metrics[metric]);
    const values = at.map((point) => point.metrics[metric]);
    const shift = (place - (curve.lines.length - 1) / 2) * step;
    const seeds = at.flatMap((point) => point.metrics[metric].seeds.map((value) => [point.at + shift, value]));
    const style = rowStyle({ place, kind: "language" });
    const means = {
      type: "scatter",
      mode: "lines+markers",
      name: plain(line.name),
      legendgroup: String(place),
      x: at.map((point) => point.at + shift),
      y: values.map((value) => value.mean),
      customdata: at.map((point) => [plain(point.row), point.value]),
      line: { color: style.color, width: 2 },
      // What valid would choose is large and open.
      marker: {
        symbol: at.map((point) => style.symbol + (point.best ? "-open" : "")),
        size: at.map((point) => (point.best ? 15 : 8)),
        line: { width: 2 },
      },
      error_y: {
        type: "data", symmetric: false, thickness: 1, width: 3, color: style.color,
        array: values.map((value) => gap(value, "high")), arrayminus: values.map((value) => gap(value, "low")),
      },
      hovertemplate: `<b>%{customdata[0]}</b><br>${plain(curve.setting)} %{customdata[1]}: %{y:.4f}<extra></extra>`,
    };
    if (seeds.length === at.length) return [means];
    return [means, {
      type: "scatter",
      mode: "markers",
      legendgroup: String(place),
      showlegend: false,
      x: seeds.map((seed) => seed[0]),
      y: seeds.map((seed) => seed[1]),
      marker: { color: style.color, size: 4, opacity: 0.5 },
      hoverinfo: "skip",
    }];
  });
  draw(plot, traces, {
    xaxis: {
      title: { text: plain(curve.setting) + (curve.scaled ? ", on a scale that grows like a logarithm" : "") },
      tickvals: curve.ticks.map((tick) => tick.at),
      ticktext: curve.ticks.map((tick) => String(tick.value)),
    },
    yaxis: { title: { text: plain(title(metric)) } },
  }, `${title(metric)} of every line by ${curve.setting}`);
}

function drawDepth(plot, rows, measure, label) {
  const traces = rows.filter((row) => row.at_k[measure]).map((row) => {
    const style = rowStyle(row);
    return {
      type: "scatter",
      mode: row.at_k[measure].length > 25 ? "lines" : "lines+markers",
      name: plain(row.name),
      x: row.at_k[measure].map((_, place) => place + 1),
      y: row.at_k[measure],
      line: { color: style.color, dash: style.dash, width: 2 },
      marker: { symbol: style.symbol, size: 6 },
      hovertemplate: `<b>${plain(row.name)}</b><br>K = %{x}: %{y:.4f}<extra></extra>`,
    };
  });
  draw(plot, traces, {
    xaxis: { title: { text: "K, items in the list" } },
    yaxis: { title: { text: plain(label) }, rangemode: "tozero" },
  }, `${label} of every model by the length of the list`);
}

function drawGroups(plot, breakdown, rows, label) {
  // So many bars need this much; on a narrow screen the figure scrolls.
  plot.style.minWidth = `${100 + 13 * rows.length * breakdown.groups.length}px`;
  const names = breakdown.groups.map((group) => `${plain(group.label)}<br>n = ${group.count.toLocaleString("en")}`);
  const traces = rows.filter((row) => breakdown.rows[row.name]).map((row) => ({
    type: "bar",
    name: plain(row.name),
    x: names,
    y: breakdown.rows[row.name],
    marker: {
      color: rowStyle(row).color,
      pattern: {
        shape: row.kind === "language" ? "/" : rowStyle(row).pattern, size: 7, solidity: 0.22,
        fgcolor: colour("paper"), bgcolor: rowStyle(row).color,
      },
    },
    hovertemplate: `<b>${plain(row.name)}</b><br>%{x}<br>%{y:.4f}<extra></extra>`,
  }));
  draw(plot, traces, {
    barmode: "group",
    bargap: 0.18,
    legend: { ...LEGEND, x: 0, xanchor: "left" },
    xaxis: { type: "category", showgrid: false },
    yaxis: { title: { text: plain(label) } },
  }, `${label} of every model by ${breakdown.name}`);
}

/** One line a row and seed. `part` is loss or valid. */
function drawTraining(plot, rows, part, label, log) {
  const traces = rows.flatMap((row) => row.curves.map((curve, place) => {
    const style = rowStyle(row);
    const valid = part === "valid";
    return {
      type: "scatter",
      mode: "lines+markers",
      name: plain(row.name),
      legendgroup: row.name,
      showlegend: place === 0,
      opacity: place === 0 ? 1 : 0.55,
      x: valid ? curve.valid.map((point) => point[0]) : curve.loss.map((_, place) => place + 1),
      y: valid ? curve.valid.map((point) => point[1]) : curve.loss,
      line: { color: style.color, dash: style.dash, width: 1.8 },
      marker: { symbol: style.symbol, size: 4 },
      hovertemplate: `<b>${plain(row.name)}</b>, seed ${curve.seed}<br>epoch %{x}: %{y:.4f}<extra></extra>`,
    };
  }));
  draw(plot, traces, {
    xaxis: { title: { text: "epoch" }, rangemode: "tozero" },
    yaxis: { title: { text: plain(label) }, type: log ? "log" : "linear" },
  }, `${label} by epoch, a line a row and seed`);
}
