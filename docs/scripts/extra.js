// Formulas by KaTeX, tables of the class "sortable" by a click on a heading, wide code in smaller letters,
// and the parameters of a method at a click. Nothing here reaches the network.

const formulas = (root) => {
  for (const element of root.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    const display = text.startsWith("\\[");
    katex.render(text.slice(2, -2), element, { displayMode: display, throwOnError: false });
  }
};

const sortable = (root) => {
  for (const table of root.querySelectorAll(".sortable table")) {
    table.querySelectorAll("th").forEach((heading, column) => {
      const button = document.createElement("button");
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const up = heading.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].textContent.trim();
        const order = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true }) * (up ? 1 : -1);
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
      });
    });
  }
};

const fitted = (root) => {
  for (const code of root.querySelectorAll(".highlight pre > code")) {
    code.style.whiteSpace = "pre";
    const share = code.clientWidth / code.scrollWidth;
    if (share < 0.6) {
      code.style.whiteSpace = "";
    } else if (share < 1) {
      code.style.fontSize = `${0.84 * share}em`;
    }
  }
};

const folded = (root) => {
  for (const body of root.querySelectorAll(".doc-class .doc-function > .doc-contents")) {
    const parts = [...body.children];
    const rest = parts.slice(parts.findIndex((part) => part.tagName === "P") + 1);
    const titles = rest.flatMap((part) => [...part.querySelectorAll(".doc-section-title")]);
    if (titles.length) {
      const details = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = titles.map((title) => title.textContent.replace(":", "")).join(", ");
      details.append(summary, ...rest);
      body.append(details);
    }
  }
};

folded(document);
fitted(document);
formulas(document);
sortable(document);
