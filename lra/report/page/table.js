// Tables: their elements, the order of their rows, and which rows are shown.

const DASH = "–";

// Returns an element. Text is set as text, whatever characters a name is made of.
function element(tag, { text, on, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  for (const [name, handler] of Object.entries(on ?? {})) made.addEventListener(name, handler);
  made.append(...children);
  return made;
}

// Returns the number that a cell begins with, or null: a date or a hash is none.
function number(cell) {
  const found = cell.match(/^[+−]?[\d,]+(\.\d+)?(?![\w.:,-])/);
  return found ? Number(found[0].replaceAll(",", "").replace("−", "-")) : null;
}

function missing(cell) {
  return cell === DASH || cell === "running" || cell.startsWith("✗");
}

// Whether all cells of a column are numbers or missing, and one is a number.
function isNumeric(rows, column) {
  const cells = rows.map((row) => row.cells[column]).filter((cell) => !missing(cell));
  return cells.length > 0 && cells.every((cell) => number(cell) !== null);
}

// Returns the rows in order of a column: numbers by value, missing ones last in both directions,
// equal ones as they were.
function sorted(rows, column, descending) {
  const numeric = isNumeric(rows, column);
  const sign = descending ? -1 : 1;
  const key = (row) => (numeric ? number(row.cells[column]) : row.cells[column]);
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  return rows
    .map((row) => [key(row), row])
    .sort((a, b) => compare(a[0], b[0]))
    .map(([, row]) => row);
}

// Returns a section of a table: rows in groups, each sorted on its own and under its own line.
//
// order is {column, descending} or null for the order of the report; onOrder is called with the
// next one, and onOpen with a row's name and the places of its runs.
function tableSection(table, rows, { order, onOrder, onOpen }) {
  const section = [element("h2", { text: table.title })];
  section.push(...table.above.map((text) => element("p", { class: "above", text })));
  const numeric = table.columns.map((_, i) => i >= table.left && isNumeric(table.rows, i));
  const kinds = numeric.map(
    (is, i) => is && (table.rows.some(({ cells }) => cells[i].includes("±")) ? "score" : "number"),
  );
  const head = table.columns.map((name, i) => {
    const active = order?.column === name;
    const direction = active ? (order.descending ? "descending" : "ascending") : "none";
    const next = !active
      ? { column: name, descending: numeric[i] && name !== "rank" }
      : { column: name, descending: !order.descending };
    const text = name.replace(/ (%|s|MB|\d+)$/, "\u00a0$1"); // a unit stays with its word
    const button = element("button", { type: "button", text, on: { click: () => onOrder(next) } });
    const attributes = { scope: "col", "aria-sort": direction, class: kinds[i] };
    return element("th", attributes, button);
  });
  const bodies = new Map();
  for (const row of rows) {
    const group = row.group ?? "";
    if (!bodies.has(group)) bodies.set(group, []);
    bodies.get(group).push(row);
  }
  const column = table.columns.indexOf(order?.column);
  const parts = [...bodies].map(([group, members]) => {
    const body = element("tbody");
    if (group) {
      const wide = { colspan: table.columns.length, scope: "rowgroup", class: "group" };
      body.append(element("tr", {}, element("th", wide, element("span", { text: group }))));
    }
    const inOrder = column < 0 ? members : sorted(members, column, order.descending);
    body.append(...inOrder.map((row) => tableRow(table, row, kinds, onOpen)));
    return body;
  });
  const grid = element("table", {}, element("thead", {}, element("tr", {}, ...head)), ...parts);
  section.push(element("div", { class: "scroll", tabindex: 0 }, grid));
  if (!rows.length) section.push(element("p", { class: "above", text: "No row is left." }));
  section.push(...table.notes.map((text) => element("p", { class: "note", text })));
  return section;
}

function tableRow(table, row, kinds, onOpen) {
  const cells = row.cells.map((text, i) => {
    const runs = row.links?.[table.columns[i]] ?? (i === 0 ? row.runs : undefined);
    const kind = [kinds[i], missing(text) && "missing"].filter(Boolean).join(" ");
    const attributes = { class: kind || undefined, scope: i === 0 ? "row" : undefined };
    const tag = i === 0 ? "th" : "td";
    if (!runs) return element(tag, attributes, ...cellParts(text, kinds[i]));
    const open = () => onOpen(row.label, runs);
    const button = element(
      "button",
      { type: "button", class: "open", on: { click: open } },
      ...cellParts(text, kinds[i]),
    );
    return element(tag, attributes, button);
  });
  const line = element("tr", { class: row.runs ? "ours" : "other" }, ...cells);
  if (row.runs) {
    // The buttons are for keyboards too; a click anywhere else in the row does the same.
    line.addEventListener("click", (event) => {
      if (!event.target.closest("button")) onOpen(row.label, row.runs);
    });
  }
  return line;
}

// Returns a cell's text; of a score, deviation and number of seeds are less loud.
function cellParts(text, kind) {
  const [, mean, rest, marks] = text.match(/^(\S+)( ± [^†‡*¶§]*)(.*)$/) ?? [];
  if (kind !== "score" || mean === undefined) return [text];
  return [mean, element("span", { class: "deviation", text: rest }), marks];
}
