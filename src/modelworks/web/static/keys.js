// Keys of the chat: single ones, outside of text fields only, so that the browser's and a screen reader's own are never
// taken; and they can be switched off (WCAG 2.1.4). A key does what a button does, by pressing it.
"use strict";

const keys = {
  last: (selector) => [...document.querySelectorAll(selector)].filter((each) => !each.disabled).at(-1),
  named: (name, within = ".turn.model ") => keys.last(`${within}[aria-label="${modelworks.word(name)}"]`),

  // What each key does, and the words for it; one that finds nothing to press does nothing.
  all: () => [
    ["n", modelworks.word("New chat"), () => document.querySelector(".nav.primary")?.click()],
    ["s", modelworks.word("Search the conversations"), () => document.querySelector(".side input")?.focus()],
    ["m", modelworks.word("Write a message"), () => document.querySelector(".composer textarea")?.focus()],
    ["c", modelworks.word("Copy the last answer"), () => keys.named("Copy")?.click()],
    ["r", modelworks.word("Answer the last question again"), () => keys.named("Answer again")?.click()],
    [",", modelworks.word("Earlier version of the last message that has several"), () => keys.version("Earlier version")],
    [".", modelworks.word("Later version of the last message that has several"), () => keys.version("Later version")],
    ["Esc", modelworks.word("Stop the answer, or leave the field"), null],
    ["?", modelworks.word("This overview"), () => keys.overview()],
  ],
  version(name) {
    const turn = [...document.querySelectorAll(".turn")].findLast((each) =>
      each.querySelector(`[aria-label="${modelworks.word("Later version")}"]`),
    );
    turn?.querySelector(`[aria-label="${modelworks.word(name)}"]:not([disabled])`)?.click();
  },

  get on() {
    return localStorage.getItem("modelworks_keys") !== "off";
  },
  overview() {
    const dialog = document.createElement("dialog");
    dialog.className = "keys";
    dialog.setAttribute("aria-labelledby", "keys-title");
    const make = (tag, text, parent, properties = {}) =>
      parent.appendChild(Object.assign(document.createElement(tag), { textContent: text, ...properties }));
    make("h2", modelworks.word("Keyboard shortcuts"), dialog, { id: "keys-title" });
    make("p", modelworks.word("They work outside of text fields; Esc leaves one."), dialog);
    const list = make("dl", "", dialog);
    for (const [key, words] of this.all()) {
      if (key === "s" && !document.querySelector(".side input")) continue;
      make("kbd", key, make("dt", "", list));
      make("dd", words, list);
    }
    const label = make("label", "", dialog);
    const box = make("input", "", label, { type: "checkbox", checked: this.on });
    label.append(modelworks.word("Use these keys"));
    box.addEventListener("change", () => localStorage.setItem("modelworks_keys", box.checked ? "on" : "off"));
    const close = make("button", modelworks.word("Close"), dialog, { type: "button" });
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.defaultPrevented || event.repeat) return;
  if (document.querySelector("dialog[open], .q-dialog, .q-menu")) return; // they have keys of their own
  const field = event.target.closest?.("input, textarea, select, [contenteditable], [role=slider], [role=combobox]");
  if (event.key === "Escape") {
    const stop = document.querySelector(`.send[aria-label="${modelworks.word("Stop")}"]`);
    if (stop) stop.click();
    else field?.blur();
  } else if (!field && keys.on && document.querySelector(".chat")) {
    const found = keys.all().find(([key, , act]) => act && key === event.key);
    if (!found) return;
    event.preventDefault();
    found[2]();
  }
});
