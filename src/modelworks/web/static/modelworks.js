// What only the browser can do: the theme before the first paint, drafts that survive a reload, copying, and a
// conversation that stays at its end while it grows.
"use strict";

const modelworks = {
  words: {},
  word(english) {
    return this.words[english] ?? english;
  },

  theme() {
    const dark = !document.body.classList.contains("body--dark");
    document.cookie = `modelworks_theme=${dark ? "dark" : "light"};path=/;max-age=31536000;samesite=lax`;
    setDark(dark);
  },

  language(code) {
    document.cookie = `modelworks_language=${code};path=/;max-age=31536000;samesite=lax`;
    location.reload();
  },

  // The server answers "sent" for a message that it has stored; until then the draft is kept.
  draftKey() {
    return "draft:" + location.pathname;
  },
  draftSaved(text) {
    try {
      text ? localStorage.setItem(this.draftKey(), text) : localStorage.removeItem(this.draftKey());
    } catch (error) {
      console.warn("the draft can't be kept:", error);
    }
  },
  draft() {
    try {
      return localStorage.getItem(this.draftKey()) || "";
    } catch {
      return "";
    }
  },

  // What was sent leaves the field; what has been typed since stays.
  sent(text) {
    const field = document.querySelector(".composer textarea");
    if (!field) return;
    if (field.value.startsWith(text)) {
      field.value = field.value.slice(text.length);
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    this.draftSaved(field.value);
  },

  // Scroll to the end as long as the reader is there; for a reader who scrolled up, hold what is read in its place, and
  // draw older turns before they are needed.
  follow(id, seen = null) {
    const region = document.getElementById(id);
    if (!region || region.dataset.followed) return;
    region.dataset.followed = "yes";
    let atEnd = true;
    let held = null; // the turn at the region's upper edge, and where in the conversation it is
    const button = document.querySelector(".to-end");
    const hold = () => {
      const box = region.getBoundingClientRect();
      const there = document.elementFromPoint(box.left + box.width / 2, box.top + 8)?.closest(".turn");
      const turn = there ?? held?.turn; // between two turns, the last one
      held = turn && { turn, top: turn.offsetTop };
    };
    const older = () => {
      const more = region.querySelector(".older:not(.hidden)");
      const drawn = region.querySelectorAll(".turn").length;
      if (region.scrollTop > 3 * region.clientHeight || !more || more.dataset.asked === String(drawn)) return;
      more.dataset.asked = drawn; // once for each time that some are drawn
      more.click();
    };
    const settle = () => {
      if (atEnd) region.scrollTop = region.scrollHeight;
      else if (held?.turn.isConnected) region.scrollTop += held.turn.offsetTop - held.top;
      hold();
      older();
    };
    region.addEventListener("scroll", () => {
      atEnd = region.scrollHeight - region.scrollTop - region.clientHeight < 60;
      button?.classList.toggle("shown", !atEnd);
      hold();
      older();
    });
    new MutationObserver(settle).observe(region, { childList: true, subtree: true, characterData: true });
    new ResizeObserver(settle).observe(region);
    button?.addEventListener("click", () => region.scrollTo({ top: region.scrollHeight, behavior: "smooth" }));
    const found = region.querySelector(`.turn[data-message="${seen}"]`);
    if (found) {
      atEnd = false;
      found.classList.add("found");
      found.scrollIntoView();
    } else {
      region.scrollTop = region.scrollHeight;
    }
  },

  async copy(text) {
    if (navigator.clipboard && window.isSecureContext) {
      await navigator.clipboard.writeText(text);
      return;
    }
    // Over plain http from another machine the clipboard is out of reach; a selection can still be copied.
    const area = Object.assign(document.createElement("textarea"), { value: text });
    area.style.cssText = "position:fixed;opacity:0";
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  },
};

document.addEventListener("click", async (event) => {
  const link = event.target.closest(".said a[href]");
  if (link) {
    event.preventDefault();
    window.open(link.href, "_blank", "noopener,noreferrer");
    return;
  }
  const toggle = event.target.closest(".code-toggle");
  if (toggle) toggle.ariaPressed = String(toggle.closest(".diagram").classList.toggle("as-code"));
  const button = event.target.closest(".code-copy");
  if (!button) return;
  await modelworks.copy(button.closest(".code").querySelector("pre").textContent);
  button.textContent = modelworks.word("Copied");
  setTimeout(() => (button.textContent = modelworks.word("Copy")), 1500);
});
