// What only the browser can do: the theme before the first paint, drafts that survive a reload, copying, and a
// conversation that stays at its end while it grows.
"use strict";

const modelworks = {
  theme() {
    const dark = !document.body.classList.contains("body--dark");
    document.cookie = `modelworks_theme=${dark ? "dark" : "light"};path=/;max-age=31536000;samesite=lax`;
    setDark(dark);
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

  // Scroll to the end as long as the reader is there; a reader who scrolled up is left alone.
  follow(id) {
    const region = document.getElementById(id);
    if (!region || region.dataset.followed) return;
    region.dataset.followed = "yes";
    let atEnd = true;
    const toEnd = () => (region.scrollTop = region.scrollHeight);
    const button = document.querySelector(".to-end");
    region.addEventListener("scroll", () => {
      atEnd = region.scrollHeight - region.scrollTop - region.clientHeight < 60;
      button?.classList.toggle("shown", !atEnd);
    });
    new MutationObserver(() => atEnd && toEnd()).observe(region, {
      childList: true,
      subtree: true,
      characterData: true,
    });
    new ResizeObserver(() => atEnd && toEnd()).observe(region);
    button?.addEventListener("click", () => region.scrollTo({ top: region.scrollHeight, behavior: "smooth" }));
    toEnd();
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
  const button = event.target.closest(".code-copy");
  if (!button) return;
  await modelworks.copy(button.closest(".code").querySelector("pre").textContent);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
