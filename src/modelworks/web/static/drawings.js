// Formulas and diagrams in what a model wrote, drawn here and now with what the server carries: KaTeX and Mermaid, each
// fetched when the first one is seen. Both get a stranger's words. KaTeX may make no links and no attributes. Mermaid is
// strict, and its picture is shown as an image, in which nothing runs, nothing is fetched and nothing can be clicked.
"use strict";

const drawings = {
  base: document.currentScript.src.replace(/[^/]*$/, ""),
  pictures: new Map(), // by theme and source, so that a growing answer's diagram is drawn once
  number: 0,

  formulas: null,
  loadFormulas() {
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: this.base + "katex/katex.min.css" });
    document.head.append(style);
    return import(this.base + "katex/katex.min.js").then(() => globalThis.katex);
  },
  async formula(element) {
    element.dataset.seen = "";
    const katex = globalThis.katex ?? (await (this.formulas ??= this.loadFormulas()));
    const own = element.cloneNode(false);
    const options = {
      displayMode: "display" in own.dataset, throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 500,
      errorColor: "currentColor",
    };
    try {
      katex.render(own.dataset.tex, own, options);
    } catch (error) {
      element.title = String(error.message).slice(0, 300); // its TeX stays as it was written
      return;
    }
    if (options.displayMode) own.tabIndex = 0; // a long one is scrolled sideways, by keys as well
    element.replaceWith(own);
  },

  diagrams: null,
  async diagram(block) {
    block.dataset.seen = "";
    const source = block.querySelector("pre").textContent;
    const dark = document.body.classList.contains("body--dark");
    const key = `${dark} ${source}`;
    if (!this.pictures.has(key)) this.pictures.set(key, this.picture(source, dark));
    const picture = await this.pictures.get(key);
    block.querySelector(".picture, .notice")?.remove();
    if (picture.wrong) {
      const notice = Object.assign(document.createElement("p"), { className: "notice", textContent: picture.wrong });
      block.classList.remove("drawn");
      block.append(notice);
      return;
    }
    const image = Object.assign(new Image(picture.width, picture.height), { src: picture.address, className: "picture" });
    image.alt = source.trim();
    block.classList.add("drawn");
    block.append(image);
  },
  async picture(source, dark) {
    const { mermaid } = await (this.diagrams ??= import("nicegui-mermaid"));
    mermaid.initialize({
      startOnLoad: false,
      securityLevel: "strict",
      suppressErrorRendering: true,
      htmlLabels: false,
      flowchart: { htmlLabels: false },
      theme: dark ? "dark" : "neutral",
      fontFamily: "sans-serif",
      maxTextSize: 20000,
      maxEdges: 300,
      secure: [
        "secure", "securityLevel", "startOnLoad", "maxTextSize", "maxEdges", "suppressErrorRendering", "htmlLabels",
        "flowchart", "themeCSS", "themeVariables", "fontFamily", "altFontFamily", "dompurifyConfig",
      ],
    });
    try {
      const { svg } = await mermaid.render(`drawing-${++this.number}`, source);
      const parsed = new DOMParser().parseFromString(svg, "text/html").querySelector("svg");
      const [, , width, height] = parsed.getAttribute("viewBox").split(/[\s,]+/).map(Number);
      parsed.setAttribute("width", width);
      parsed.setAttribute("height", height);
      const text = new XMLSerializer().serializeToString(parsed);
      return { address: "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text), width, height };
    } catch (error) {
      document.querySelectorAll(`#drawing-${this.number}, #ddrawing-${this.number}`).forEach((left) => left.remove());
      return { wrong: `${modelworks.word("This diagram can't be drawn:")} ${String(error?.message ?? error).slice(0, 300)}` };
    }
  },

  drawIn(element) {
    for (const formula of element.querySelectorAll(".formula:not([data-seen])")) this.formula(formula);
    for (const diagram of element.querySelectorAll(".diagram:not([data-seen])")) this.diagram(diagram);
  },
  redraw() {
    for (const diagram of document.querySelectorAll(".diagram.drawn")) this.diagram(diagram);
  },
};

document.addEventListener("DOMContentLoaded", () => {
  drawings.drawIn(document);
  const added = (changes) => {
    for (const change of changes)
      for (const node of change.addedNodes) if (node.nodeType === Node.ELEMENT_NODE) drawings.drawIn(node.parentNode ?? node);
  };
  new MutationObserver(added).observe(document.body, { childList: true, subtree: true });
  let dark = document.body.classList.contains("body--dark");
  new MutationObserver(() => {
    if (dark === (dark = document.body.classList.contains("body--dark"))) return;
    drawings.redraw();
  }).observe(document.body, { attributeFilter: ["class"] });
});
