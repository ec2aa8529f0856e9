"use strict";
// Draws the matrix from the JSON in the page. Text only ever goes in through textContent, so that
// nothing in a message is read as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const make = (tag, classes = "", text = "") => {
    const made = document.createElement(tag);
    if (classes) made.className = classes;
    made.textContent = text;
    return made;
  };

  // What each status looks like: its symbol can be told without colour.
  const LOOK = {
    passed: { symbol: "✓", classes: "pass" },
    failed: { symbol: "✗", classes: "fail" },
    error: { symbol: "!", classes: "err" },
    "not offered": { symbol: "–", classes: "off" },
    "not asked": { symbol: "·", classes: "off" },
  };
  // JSON has no infinity and no NaN: they come as words.
  const number = (x) => (typeof x === "string" ? { inf: Infinity, "-inf": -Infinity }[x] ?? NaN : x);
  const written = (x) =>
    x === Infinity ? "∞" : Number.isNaN(x) ? "NaN"
      : x <= 1 ? x.toFixed(2) : x < 1e4 ? String(Number(x.toPrecision(3)))
        : x.toExponential(1).replace("e+", "e");
  // How deep a share is coloured. Most stay below 0.2, and a straight scale would show them alike;
  // the ticks of the legend stand where this puts them.
  const depth = (share) => Math.min(1, Math.max(0, share)) ** 0.6;
  // A long name breaks at its joints before it breaks anywhere else.
  const breakable = (element, name, joint) =>
    name.split(joint).forEach((piece) => element.append(piece, make("wbr")));
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  // The data, by row and column; a cell that was not asked is one too, so that arrows can cross it.
  const columns = data.columns.map((column, index) => ({ ...column, index, shown: true }));
  const rows = data.cases.map((name, index) => ({ name, index, shown: true, cells: [], worst: -1 }));
  for (const row of rows) row.cells = columns.map(() => ({ status: "not asked", shares: {} }));
  for (const cell of data.cells) {
    const found = { shares: {}, where: {}, ...cell, worst: number(cell.worst) };
    rows[cell.case].cells[cell.column] = found;
  }
  // For "worst first": whatever failed comes before whatever passed.
  const rank = (cell) =>
    cell.status === "error" ? Infinity
      : cell.status === "failed" ? (cell.worst >= 1 ? cell.worst : Number.MAX_VALUE)
        : cell.status === "passed" ? cell.worst : -1;
  const rankOf = (row) =>
    Math.max(-1, ...row.cells.filter((_, i) => columns[i].shown).map(rank));

  const count = (status, cells = data.cells) => cells.filter((c) => c.status === status).length;

  // Head ----------------------------------------------------------------------------------------
  const total = data.cells.length;
  const wrong = count("failed") + count("error");
  const asked = total - count("not offered");
  at("headline").textContent = !total ? "Nothing was asked"
    : wrong ? `${wrong.toLocaleString("en")} of ${plural(asked, "cell")} depart${wrong === 1 ? "s" : ""} from the judge`
      : asked ? `All ${plural(asked, "cell")} agree with the judge` : "Nothing asked for is offered";
  const seconds = data.cells.reduce((sum, cell) => sum + (cell.seconds ?? 0), 0);
  at("subline").textContent = [
    `${plural(rows.length, "case")}, ${plural(columns.length, "column")}`,
    `${seconds.toFixed(seconds < 10 ? 1 : 0)} s of judging`,
    data.date.replace("T", " ").replace("+00:00", " UTC"),
  ].filter(Boolean).join(" · ");
  for (const [name, value] of data.environment) {
    at("environment").append(make("dt", "", name), make("dd", "", value));
  }

  // Matrix --------------------------------------------------------------------------------------
  const table = at("matrix");
  const heading = make("tr");
  const corner = make("th", "", "case");
  corner.scope = "col";
  heading.append(corner);
  for (const column of columns) {
    column.th = make("th");
    column.th.scope = "col";
    breakable(column.th, column.backend, /(?<=[.:_])/);
    const part = data.cells.filter((c) => c.column === column.index && c.status !== "not offered");
    column.th.append(make("small", "", column.form));
    column.th.append(make("small", "", `${count("passed", part)}/${part.length}`));
    heading.append(column.th);
  }
  table.tHead.append(heading);
  table.style.setProperty("--columns", Math.max(1, columns.length));
  for (const row of rows) {
    row.tr = make("tr");
    const th = make("th");
    th.scope = "row";
    breakable(th, row.name, /(?<=-)/);
    row.tr.append(th);
    row.cells.forEach((cell, i) => {
      const { symbol, classes } = LOOK[cell.status];
      const share = written(cell.worst ?? 0);
      const text = { passed: share, failed: `✗ ${share}`, error: "! error" }[cell.status] ?? symbol;
      const td = make("td", classes, text);
      td.setAttribute("role", "gridcell");
      td.tabIndex = -1;
      const used = ["passed", "failed"].includes(cell.status) ? `, ${share} of the allowance` : "";
      const { backend, form } = columns[i];
      td.setAttribute("aria-label", `${row.name}, ${backend} ${form}: ${cell.status}${used}`);
      if (cell.status === "passed") td.style.setProperty("--depth", depth(cell.worst));
      Object.assign(cell, { td, row, column: columns[i] });
      td.cell = cell;
      row.tr.append(td);
    });
    table.tBodies[0].append(row.tr);
  }

  // Moving about: one cell is the grid's tab stop, arrows hand it on ------------------------------
  let here = null;
  let opened = null;
  const stop = (cell) => {
    if (here) here.td.tabIndex = -1;
    here = cell;
    if (here) here.td.tabIndex = 0;
  };
  const order = () =>
    [...table.tBodies[0].rows].map((tr) => tr.cells[1].cell.row).filter((row) => row.shown);
  const step = (key, far) => {
    const down = order();
    const across = columns.filter((column) => column.shown);
    let r = down.indexOf(here.row);
    let c = across.indexOf(here.column);
    if (key === "ArrowDown") r += 1;
    else if (key === "ArrowUp") r -= 1;
    else if (key === "ArrowRight") c += 1;
    else if (key === "ArrowLeft") c -= 1;
    else if (key === "PageDown") r += 10;
    else if (key === "PageUp") r -= 10;
    else if (key === "Home") { c = 0; if (far) r = 0; }
    else if (key === "End") { c = across.length - 1; if (far) r = down.length - 1; }
    else return false;
    const within = (x, list) => Math.max(0, Math.min(x, list.length - 1));
    const next = down[within(r, down)].cells[across[within(c, across)].index];
    stop(next);
    next.td.focus();
    if (opened) open(next); // an open panel follows, as a spreadsheet's does
    return true;
  };
  table.addEventListener("keydown", (event) => {
    if (!event.target.cell || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") {
      open(event.target.cell);
      at("panel").focus();
    } else if (!step(event.key, event.ctrlKey)) return;
    event.preventDefault();
  });
  table.addEventListener("click", (event) => {
    const cell = event.target.closest("td")?.cell;
    if (cell) { stop(cell); open(cell); }
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    (here?.td ?? at("search")).focus();
  });

  // The details of one cell ---------------------------------------------------------------------
  const quoted = (word) =>
    /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
  const section = (title, text) => {
    const body = at("panel-body");
    body.append(make("h3", "", title), make("p", "message", text));
  };
  const bar = (name, share, first) => {
    const line = make("li");
    const over = !(share <= 1);
    const track = make("span", over ? "bar over" : "bar");
    const fill = make("i");
    // The track ends at one and a half allowances; what goes beyond fills it.
    fill.style.width = `${Number.isFinite(share) ? Math.min(100, share / 0.015) : 100}%`;
    track.append(fill);
    track.setAttribute("aria-hidden", "true");
    line.append(make("span", "name", name), track);
    line.append(make("span", "value", over ? `✗ ${written(share)}` : written(share)));
    if (first) line.append(make("span", "first", `first differs at [${first.join(", ")}]`));
    return line;
  };
  function open(cell) {
    opened?.td.removeAttribute("aria-selected");
    opened = cell;
    cell.td.setAttribute("aria-selected", "true");
    const { symbol, classes } = LOOK[cell.status];
    const { backend, form, command } = cell.column;
    at("panel-place").textContent = `${backend} · ${form}`;
    at("panel-title").textContent = cell.row.name;
    const badge = make("b", classes, `${symbol} ${cell.status}`);
    if (cell.status === "passed") badge.style.setProperty("--depth", depth(cell.worst));
    const ms = Math.round(1000 * (cell.seconds ?? 0));
    const took = cell.seconds === undefined ? "" : ms < 1000 ? `in ${ms} ms` : `in ${ms / 1000} s`;
    at("panel-status").replaceChildren(badge, make("span", "soft", took));
    at("panel-body").replaceChildren();
    if (cell.problem) section("What happened", cell.problem);
    if (cell.missing) section("Why it was not asked", cell.missing);
    if (cell.cause) section("Likely cause", cell.cause);
    const shares = Object.entries(cell.shares).map(([name, share]) => [name, number(share)]);
    if (shares.length) {
      const list = make("ul", "shares");
      const axis = make("li");
      const scale = make("div", "axis");
      scale.append(make("span", "", "allowed"));
      axis.append(scale);
      axis.setAttribute("aria-hidden", "true");
      list.append(axis, ...shares.map(([name, share]) => bar(name, share, cell.where[name])));
      at("panel-body").append(make("h3", "", "Each result, as a share of its allowance"), list);
    }
    // Lines break between options, not within them.
    at("command").replaceChildren();
    for (const part of `${command} --case ${quoted(cell.row.name)}`.split(/ (?=--)/)) {
      if (at("command").firstChild) at("command").append(" ");
      at("command").append(make("span", "", part));
    }
    at("copied").textContent = "";
    at("panel").hidden = false;
    at("panel").scrollTop = 0;
    document.documentElement.classList.add("panel-open");
    cell.td.scrollIntoView({ block: "nearest", inline: "nearest" });
    const name = [cell.row.name, backend, form].map(encodeURIComponent).join("/");
    history.replaceState(null, "", `#${name}`);
  }
  const close = () => {
    if (!opened) return;
    opened.td.removeAttribute("aria-selected");
    at("panel").hidden = true;
    document.documentElement.classList.remove("panel-open");
    if (opened.td.offsetParent) opened.td.focus();
    opened = null;
    history.replaceState(null, "", "#");
  };
  at("close").addEventListener("click", close);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
  });
  at("copy").addEventListener("click", async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(at("command").textContent);
    } catch { // no clipboard for pages from disk in some browsers: the old way
      getSelection().selectAllChildren(at("command"));
      done = document.execCommand("copy");
    }
    at("copied").textContent = done ? "Copied." : "Selected; copy it with the keyboard.";
  });

  // Filters -------------------------------------------------------------------------------------
  let wanted = "all";
  const chip = (parent, text, amount, pressed) => {
    const button = make("button", "chip", text);
    button.type = "button";
    if (amount !== null) button.append(make("span", "count", amount.toLocaleString("en")));
    button.setAttribute("aria-pressed", pressed);
    at(parent).append(button);
    return button;
  };
  const choices = new Map();
  for (const status of ["all", "passed", "failed", "error", "not offered"]) {
    const name = status === "all" ? "All" : `${LOOK[status].symbol} ${status}`;
    const amount = status === "all" ? total : count(status);
    const button = chip("statuses", name, amount, status === "all");
    choices.set(status, button);
    button.addEventListener("click", () => {
      wanted = wanted === status ? "all" : status;
      filter();
    });
  }
  const backends = [...new Set(columns.map((column) => column.backend))];
  for (const backend of backends) {
    const button = chip("backends", backend, null, true);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      for (const column of columns) if (column.backend === backend) column.shown = on;
      filter();
    });
  }
  const filter = () => {
    const text = at("search").value.trim().toLowerCase();
    choices.forEach((button, status) => button.setAttribute("aria-pressed", status === wanted));
    for (const column of columns) column.th.hidden = !column.shown;
    const matches = ({ column, status }) =>
      column.shown && status !== "not asked" && (wanted === "all" || status === wanted);
    for (const row of rows) {
      row.shown = row.name.toLowerCase().includes(text) && row.cells.some(matches);
      row.tr.hidden = !row.shown;
      for (const cell of row.cells) cell.td.hidden = !cell.column.shown;
    }
    const worst = at("order").getAttribute("aria-pressed") === "true";
    const sorted = [...rows].sort((a, b) => (worst && rankOf(b) - rankOf(a)) || a.index - b.index);
    table.tBodies[0].append(...sorted.map((row) => row.tr));
    const left = sorted.filter((row) => row.shown);
    at("shown").textContent = left.length === rows.length ? plural(rows.length, "case")
      : `${left.length} of ${plural(rows.length, "case")}`;
    at("frame").hidden = !left.length;
    at("empty").hidden = left.length > 0;
    if (!here?.row.shown || !here?.column.shown) {
      stop(left.length ? left[0].cells[columns.find((column) => column.shown).index] : null);
    }
    fit();
  };
  at("search").addEventListener("input", filter);
  at("order").addEventListener("click", () => {
    const pressed = at("order").getAttribute("aria-pressed") === "true";
    at("order").setAttribute("aria-pressed", !pressed);
    filter();
  });
  at("clear").addEventListener("click", () => {
    wanted = "all";
    at("search").value = "";
    for (const column of columns) column.shown = true;
    for (const button of at("backends").children) button.setAttribute("aria-pressed", true);
    filter();
    at("search").focus();
  });

  // A matrix that fits scrolls with the page; a wider one in a frame of its own.
  const fit = () => {
    at("frame").classList.remove("wide");
    at("frame").classList.toggle("wide", table.scrollWidth > at("frame").clientWidth - 8);
  };
  addEventListener("resize", fit);
  filter();

  // A link may name a cell: report.html#mask-causal/torch/eager
  let named = [];
  try {
    named = location.hash.slice(1).split("/").map(decodeURIComponent);
  } catch { /* somebody else's fragment */ }
  const row = rows.find((each) => each.name === named[0]);
  const column = columns.find((each) => each.backend === named[1] && each.form === named[2]);
  if (row && column) {
    stop(row.cells[column.index]);
    open(row.cells[column.index]);
  }
})();
