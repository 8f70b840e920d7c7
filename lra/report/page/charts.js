// Figures: learning curves of every task of a table, and score against speed and memory.

const LARGEST = 26; // radius of the largest circle in a wide window, pixels

const DASHES = { "-": [], "--": [6, 4], ":": [2, 3] };

function colours() {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(name).trim();
  return { text: named("--text"), faint: named("--faint"), line: named("--line") };
}

// Black is softmax's colour, and the text's.
function colourOf(look, theme) {
  return look.color === "black" ? theme.text : look.color;
}

// Returns round ratios between two ends, a dozen at most in a range of a hundred.
function ratios(low, high) {
  const tenths = high / low < 3;
  const firsts = tenths
    ? [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]
    : [1, 1.5, 2, 3, 5, 7];
  const every = [-3, -2, -1, 0, 1, 2, 3].flatMap((power) =>
    firsts.map((first) => Number(`${first}e${power}`)),
  );
  return every.filter((value) => low <= value && value <= high);
}

// Returns what both kinds of figures have in common.
//
// range: ends of a logarithmic axis of x; without it the axis is linear and begins at 0.
function options(theme, { x, y, title, range, tooltip, onOpen }) {
  const scale = (text) => ({
    title: { display: true, text, color: theme.faint },
    ticks: { color: theme.faint },
    grid: { color: theme.line },
    border: { color: theme.line },
  });
  const across = scale(x);
  if (range) {
    Object.assign(across, { type: "logarithmic", min: range[0] / 1.15, max: range[1] * 1.15 });
    across.afterBuildTicks = (axis) =>
      (axis.ticks = ratios(axis.min, axis.max).map((value) => ({ value })));
    across.ticks.callback = String;
  } else {
    across.type = "linear";
    across.beginAtZero = true;
  }
  return {
    animation: false,
    maintainAspectRatio: false,
    interaction: { mode: "nearest", intersect: false },
    onClick: (_, [hit], chart) => hit && onOpen(chart.data.datasets[hit.datasetIndex]),
    scales: { x: across, y: { ...scale(y), grace: range ? "18%" : 0 } },
    plugins: {
      legend: { display: false },
      title: { display: true, text: title, color: theme.text, font: { size: 13, weight: "600" } },
      tooltip: {
        callbacks: { title: () => "", label: tooltip },
        filter: ({ dataset }) => !dataset.rule,
      },
    },
  };
}

// Draws a curve for every run of a panel whose label is shown; returns the chart, or null where no
// run has an evaluation.
//
// settings: {metric: "accuracy" or "loss", clock: "steps" or "minutes"}.
function curves(canvas, panel, runs, { looks, shown, settings, onOpen }) {
  const theme = colours();
  const accuracy = settings.metric === "accuracy";
  const minutes = settings.clock === "minutes";
  const datasets = panel.runs
    .map((place) => ({ place, ...runs[place] }))
    .filter((run) => shown.has(run.label))
    .map((run) => ({
      label: run.label,
      place: run.place,
      seed: run.record.seed,
      data: run.evaluations
        .map(([step, seconds, right, loss]) => ({
          x: minutes ? seconds / 60 : step,
          y: accuracy ? 100 * right : loss,
          step,
        }))
        .filter(({ y }) => typeof y === "number"),
      borderColor: colourOf(looks[run.label], theme),
      backgroundColor: colourOf(looks[run.label], theme),
      borderDash: DASHES[looks[run.label].linestyle],
      borderWidth: 1.5,
      pointRadius: run.evaluations.length > 30 ? 0 : 1.5,
      pointHoverRadius: 5,
    }))
    .filter((dataset) => dataset.data.length);
  if (!datasets.length) return null;
  const points = datasets.flatMap((dataset) => dataset.data);
  if (accuracy && panel.majority !== null) {
    const ends = [Math.min(...points.map(({ x }) => x)), Math.max(...points.map(({ x }) => x))];
    const data = ends.map((x) => ({ x, y: panel.majority }));
    datasets.push({
      rule: true,
      data,
      borderColor: theme.faint,
      borderDash: [1, 3],
      borderWidth: 1.5,
      pointRadius: 0,
      pointHitRadius: 0,
      pointHoverRadius: 0,
    });
  }
  const value = (y) => (accuracy ? `${y.toFixed(2)} %` : y.toFixed(4));
  return new Chart(canvas, {
    type: "line",
    data: { datasets },
    options: options(theme, {
      x: minutes ? "minutes, evaluations included" : "step",
      y: accuracy ? "validation accuracy %" : "validation loss, nats",
      title: `${panel.title}: learning curves`,
      tooltip: ({ dataset, raw }) =>
        `${dataset.label}, seed ${dataset.seed}: ${value(raw.y)} at step ${raw.step.toLocaleString("en-US")}`,
      onOpen: (dataset) => dataset.rule || onOpen(dataset.label, [dataset.place]),
    }),
  });
}

// Draws a circle for every row: training speed beside softmax's, score, and peak memory as area.
// Returns the chart, or null where no row is shown.
function tradeoff(canvas, view, { looks, rows, shown, onOpen }) {
  const theme = colours();
  const largest = Math.max(...view.circles.map(([, , , , bytes]) => bytes));
  const radius = Math.min(LARGEST, canvas.parentElement.clientWidth / 25);
  const datasets = view.circles
    .filter(([place, label]) => rows.has(view.rows[place]) && shown.has(label))
    .map(([place, label, speed, accuracy, bytes]) => ({
      label,
      row: view.rows[place],
      data: [{ x: speed, y: accuracy, r: radius * Math.sqrt(bytes / largest), bytes }],
      backgroundColor: `color-mix(in srgb, ${colourOf(looks[label], theme)} 45%, transparent)`,
      borderColor: colourOf(looks[label], theme),
    }));
  if (!datasets.length) return null;
  const speeds = datasets.map((dataset) => dataset.data[0].x);
  const perSecond = view.columns.indexOf("steps/s");
  return new Chart(canvas, {
    type: "bubble",
    data: { datasets },
    plugins: [{ id: "names", afterDatasetsDraw: (chart) => drawNames(chart, theme) }],
    options: options(theme, {
      x: "training steps/s, softmax = 1",
      y: "test accuracy %",
      title: `${view.score}: score, speed, memory (largest circle ${Math.round(largest / 1e6).toLocaleString("en-US")} MB)`,
      range: [Math.min(...speeds), Math.max(...speeds)],
      tooltip: ({ dataset, raw }) => {
        const steps = dataset.row.cells[perSecond];
        const speed = `${raw.x.toFixed(2)} × softmax${steps ? ` (${steps} steps/s)` : ""}`;
        return `${dataset.label}: ${raw.y.toFixed(2)} %, ${speed}, ${(raw.bytes / 1e6).toFixed(1)} MB`;
      },
      onOpen: ({ row }) => onOpen(row.label, row.runs),
    }),
  });
}

// Writes names beside circles: where they cover nothing, else where they cover no name; what has no
// such place is told by pointing at it.
function drawNames(chart, theme) {
  const { ctx, chartArea } = chart;
  const circles = chart.data.datasets.map((dataset, i) => ({
    label: dataset.label,
    r: dataset.data[0].r,
    shape: chart.getDatasetMeta(i).data[0],
  }));
  const around = ({ shape: { x, y }, r }) => ({
    left: x - r,
    right: x + r,
    top: y - r,
    bottom: y + r,
  });
  const apart = (a, b) =>
    b.right < a.left || b.left > a.right || b.bottom < a.top || b.top > a.bottom;
  const names = [];
  ctx.save();
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  ctx.fillStyle = theme.text;
  for (const circle of circles) {
    const {
      label,
      r,
      shape: { x, y },
    } = circle;
    const width = ctx.measureText(label).width;
    const [right, left, up, down] = [x + r + 3, x - r - 3 - width, y - r - 7, y + r + 7];
    const slope = 0.7 * r + 4;
    const spots = [
      [right, y],
      [left, y],
      [x - width / 2, up],
      [x - width / 2, down],
    ];
    for (const rise of [-slope, slope])
      spots.push([x + slope, y + rise], [x - slope - width, y + rise]);
    const boxes = spots
      .map(([at, middle]) => ({
        at,
        middle,
        left: at - 2,
        right: at + width + 2,
        top: middle - 7,
        bottom: middle + 7,
      }))
      .filter(
        (box) =>
          box.left > chartArea.left &&
          box.right < chartArea.right &&
          box.top > chartArea.top &&
          box.bottom < chartArea.bottom,
      )
      .filter((box) => names.every((name) => apart(box, name)));
    const others = circles.filter((other) => other !== circle).map(around);
    const box = boxes.find((one) => others.every((other) => apart(one, other))) ?? boxes[0];
    if (!box) continue;
    names.push(box);
    ctx.fillText(label, box.at, box.middle);
  }
  ctx.restore();
}
