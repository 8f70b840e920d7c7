// The page: its state, which the address keeps, and what is drawn of it.

const data = JSON.parse(document.getElementById("data").textContent);

const byId = (id) => document.getElementById(id);

const state = {
  protocol: data.protocols[0].name,
  task: null, // title of a view; null for the first
  find: "",
  without: new Set(), // attentions that are not shown
  published: true,
  modified: true,
  metric: "accuracy",
  clock: "steps",
  orders: {}, // by table: {column, descending}
  hidden: new Set(), // labels that the figures leave out
};

let charts = [];

function protocol() {
  return data.protocols.find(({ name }) => name === state.protocol) ?? data.protocols[0];
}

function view() {
  const { views } = protocol();
  return views.find(({ title }) => title === state.task) ?? views[0];
}

function isShown(row) {
  if (row.published && !state.published) return false;
  if (row.modified && !state.modified) return false;
  if (row.attention === undefined) return true; // a rule
  return (
    !state.without.has(row.attention) && row.label.toLowerCase().includes(state.find.toLowerCase())
  );
}

// Address

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state.protocol = given.get("protocol") ?? state.protocol;
  state.task = given.get("task");
  state.find = given.get("find") ?? "";
  state.without = new Set(given.getAll("without"));
  state.published = given.get("published") !== "no";
  state.modified = given.get("modified") !== "no";
  state.metric = given.get("metric") === "loss" ? "loss" : "accuracy";
  state.clock = given.get("clock") === "minutes" ? "minutes" : "steps";
  const [column, direction] = [given.get("sort"), given.get("order")];
  state.orders = column ? { main: { column, descending: direction === "descending" } } : {};
}

function writeAddress() {
  const told = new URLSearchParams({ protocol: protocol().name, task: view().title });
  if (state.find) told.set("find", state.find);
  for (const name of state.without) told.append("without", name);
  if (!state.published) told.set("published", "no");
  if (!state.modified) told.set("modified", "no");
  if (state.metric !== "accuracy") told.set("metric", state.metric);
  if (state.clock !== "steps") told.set("clock", state.clock);
  if (state.orders.main) {
    told.set("sort", state.orders.main.column);
    told.set("order", state.orders.main.descending ? "descending" : "ascending");
  }
  history.replaceState(null, "", `#${told}`);
}

function change(values) {
  Object.assign(state, values);
  writeAddress();
  draw();
}

// Drawing

function tabs(place, names, active, choose) {
  const buttons = names.map((name) =>
    element("button", {
      type: "button",
      text: name,
      "aria-pressed": String(name === active),
      on: { click: () => choose(name) },
    }),
  );
  replace(byId(place), buttons);
}

// Puts children in the place of others; the focus stays on the control of the same words.
function replace(parent, children) {
  const focused = parent.contains(document.activeElement)
    ? document.activeElement.textContent
    : null;
  parent.replaceChildren(...children);
  if (focused !== null)
    [...parent.querySelectorAll("button")]
      .find((button) => button.textContent === focused)
      ?.focus();
}

function draw() {
  const shown = view();
  byId("origin").textContent = protocol().origin;
  tabs(
    "protocols",
    data.protocols.map(({ name }) => name),
    protocol().name,
    (name) => change({ protocol: name, task: null, orders: {}, hidden: new Set() }),
  );
  tabs(
    "tasks",
    protocol().views.map(({ title }) => title),
    shown.title,
    (title) => change({ task: title, orders: {} }),
  );
  tabs("metrics", ["accuracy", "loss"], state.metric, (metric) => change({ metric }));
  tabs("clocks", ["steps", "minutes"], state.clock, (clock) => change({ clock }));
  if (byId("search").value !== state.find) byId("search").value = state.find;
  byId("published").checked = state.published;
  byId("modified").checked = state.modified;
  drawAttentions();
  drawTable("main", shown);
  const beside = protocol().beside;
  drawTable("beside", state.published ? beside : null);
  const places = new Set(shown.panels.flatMap(({ runs }) => runs));
  const runs = protocol().runs;
  drawTable("runs", { ...runs, rows: runs.rows.filter((row) => places.has(row.runs[0])) });
  drawFigures(shown);
}

function drawTable(place, table) {
  if (!table) return byId(place).replaceChildren();
  const rows = table.rows.filter(isShown);
  const order = state.orders[place] ?? null;
  const onOrder = (next) => change({ orders: { ...state.orders, [place]: next } });
  const left = byId(place).querySelector(".scroll")?.scrollLeft ?? 0;
  replace(byId(place), tableSection(table, rows, { order, onOrder, onOpen: openRuns }));
  byId(place).querySelector(".scroll").scrollLeft = left;
  if (place === "main") {
    const ours = (all) => all.filter((row) => row.runs).length;
    byId("count").textContent = `${ours(rows)} of ${ours(table.rows)} rows`;
  }
}

function drawAttentions() {
  const names = [
    ...new Set(protocol().views.flatMap(({ rows }) => rows.map((row) => row.attention))),
  ]
    .filter((name) => name !== undefined)
    .sort();
  const left = names.filter((name) => !state.without.has(name));
  byId("attentions").firstElementChild.textContent =
    `Attentions: ${left.length === names.length ? "all" : `${left.length} of ${names.length}`}`;
  byId("every").onclick = () => change({ without: new Set() });
  byId("none").onclick = () => change({ without: new Set(names) });
  const boxes = names.map((name) => {
    const box = element("input", { type: "checkbox", value: name });
    box.checked = !state.without.has(name);
    box.addEventListener("change", () => {
      const without = new Set(state.without);
      if (box.checked) without.delete(name);
      else without.add(name);
      change({ without });
    });
    return element("label", {}, box, element("span", { text: name }));
  });
  const focused = document.activeElement?.value;
  const inside = byId("attention-list").contains(document.activeElement);
  byId("attention-list").replaceChildren(...boxes);
  if (inside) boxes.find((box) => box.firstChild.value === focused)?.firstChild.focus();
}

function drawFigures(shown) {
  const { looks } = protocol();
  const rows = new Set(shown.rows.filter((row) => row.runs && isShown(row)));
  // Runs bear the label of their row in the table of the task, which tells no device.
  const labels = new Set(
    [...rows].flatMap((row) => [row.label, ...row.runs.map((place) => data.runs[place].label)]),
  );
  drawKey([...labels].sort(), looks);
  const visible = new Set([...labels].filter((label) => !state.hidden.has(label)));
  const given = { looks, rows, shown: visible, settings: state, onOpen: openRuns };
  charts.forEach((chart) => chart.destroy());
  charts = [];
  byId("charts").replaceChildren();
  const place = (name, wide, draw) => {
    const canvas = element("canvas", { role: "img", "aria-label": name });
    const box = element("div", { class: wide ? "chart wide" : "chart" }, canvas);
    byId("charts").append(box);
    const chart = draw(canvas);
    if (chart) charts.push(chart);
    else box.remove();
  };
  if (shown.circles.length) {
    const name = `${shown.title}: score, speed and memory, which the table tells too`;
    place(name, true, (canvas) => tradeoff(canvas, shown, given));
  }
  for (const panel of shown.panels) {
    const name = `${panel.title}: learning curves; a run's record has its evaluations`;
    place(name, shown.panels.length === 1, (canvas) => curves(canvas, panel, data.runs, given));
  }
}

// Draws what tells the rows in the figures apart; a click takes one out, or in again.
function drawKey(labels, looks) {
  const theme = colours();
  const borders = { "-": "solid", "--": "dashed", ":": "dotted" };
  const keys = labels.map((label) => {
    const swatch = element("span", { class: "swatch" });
    swatch.style.borderTopColor = colourOf(looks[label], theme);
    swatch.style.borderTopStyle = borders[looks[label].linestyle];
    const toggle = () => {
      const hidden = new Set(state.hidden);
      if (!hidden.delete(label)) hidden.add(label);
      change({ hidden });
    };
    const pressed = { "aria-pressed": String(!state.hidden.has(label)), on: { click: toggle } };
    const name = element("span", { text: label });
    return element("button", { type: "button", ...pressed }, swatch, name);
  });
  replace(byId("key"), keys);
}

// Record

function openRuns(label, places) {
  const name = (place) => {
    const { record } = data.runs[place];
    return `${data.sections[record.task.section].name} seed ${record.seed}`;
  };
  byId("record-title").textContent = label;
  const show = (place) => {
    const buttons = places.map((other) =>
      element("button", {
        type: "button",
        text: name(other),
        "aria-pressed": String(other === place),
        on: { click: () => show(other) },
      }),
    );
    replace(byId("record-runs"), buttons);
    byId("record-body").replaceChildren(...recordBody(data.runs[place], data.sections));
  };
  show(places[0]);
  if (!byId("record").open) byId("record").showModal();
  byId("record").scrollTop = 0;
}

byId("close").addEventListener("click", () => byId("record").close());
byId("record").addEventListener("click", (event) => {
  if (event.target === byId("record")) byId("record").close(); // beside the panel
});
byId("search").addEventListener("input", (event) => change({ find: event.target.value }));
byId("published").addEventListener("change", (event) =>
  change({ published: event.target.checked }),
);
byId("modified").addEventListener("change", (event) => change({ modified: event.target.checked }));
document.addEventListener("click", (event) => {
  if (!byId("attentions").contains(event.target)) byId("attentions").open = false;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
window.addEventListener("hashchange", () => {
  readAddress();
  draw();
});

readAddress();
draw();
