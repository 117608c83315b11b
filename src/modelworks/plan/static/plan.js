// What a plan's page does beyond being read. Events are caught at the document, so that markup can be replaced.
(() => {
  const tip = document.createElement("div");
  tip.className = "plan-tip";
  tip.setAttribute("role", "tooltip");
  const marked = (event, what) => (event.target instanceof Element ? event.target.closest(what) : null);

  const show = (element, x, y) => {
    if (!tip.isConnected) document.body.append(tip);
    tip.textContent = element.dataset.tip;
    tip.classList.add("shown");
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 10) : y + 18}px`;
  };
  document.addEventListener("pointermove", (event) => {
    const element = marked(event, "[data-tip]");
    if (element) show(element, event.clientX, event.clientY);
    else tip.classList.remove("shown");
  });
  document.addEventListener("pointerdown", (event) => {
    const element = marked(event, "[data-tip]");
    if (element) show(element, event.clientX, event.clientY);
  });
  document.addEventListener("scroll", () => tip.classList.remove("shown"), true);

  const sort = (header) => {
    const body = header.closest("table").tBodies[0];
    const column = header.cellIndex;
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
    };
    const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b)));
    body.append(...rows);
  };

  // One of several layouts is shown in full; a mark in a chart, a row in a table and a choice of a list choose it.
  const choose = (key) => {
    const sheets = [...document.querySelectorAll("[data-sheet]")];
    if (!sheets.some((sheet) => sheet.dataset.sheet === key)) return false;
    for (const sheet of sheets) sheet.hidden = sheet.dataset.sheet !== key;
    for (const one of document.querySelectorAll("[data-key]")) one.classList.toggle("chosen", one.dataset.key === key);
    return true;
  };

  const toggle = (button) => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const group of document.querySelectorAll("g[data-series]")) {
      if (group.dataset.series === button.dataset.toggles) group.style.display = shown ? "" : "none";
    }
  };

  const act = (event) => {
    const header = marked(event, ".sortable th");
    const button = marked(event, "[data-toggles]");
    const key = marked(event, "[data-key]");
    if (header) sort(header);
    else if (button) toggle(button);
    else if (key && choose(key.dataset.key)) {
      document.querySelector("[data-sheet]:not([hidden])").scrollIntoView({ block: "nearest", behavior: "smooth" });
    }
  };
  document.addEventListener("click", act);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && marked(event, "tr[data-key]")) act(event);
  });
})();
