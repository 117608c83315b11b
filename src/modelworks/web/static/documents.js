// Files that are dropped on the chat, pasted or picked: held here until the server says which conversation they are for.
const modelworksDocuments = {
  waiting: [],

  take(files) {
    const named = [...files].filter((file) => file.name);
    if (!named.length) return;
    this.waiting.push(...named);
    emitEvent("documents_taken", named.length);
  },

  async send(path, largest) {
    while (this.waiting.length) {
      const file = this.waiting.shift();
      let refused = "";
      if (file.size > largest) {
        const limit = modelworks.word("{name} is over the limit of {size} MB");
        refused = limit.replace("{name}", file.name).replace("{size}", largest >> 20);
      } else {
        const form = new FormData();
        form.append("file", file);
        try {
          const answer = await fetch(path, { method: "POST", body: form });
          if (!answer.ok) refused = (await answer.json().catch(() => ({}))).error?.message || answer.statusText;
        } catch {
          refused = modelworks.word("{name} could not be sent; a folder's files can be, one by one").replace("{name}", file.name);
        }
      }
      emitEvent("documents_sent", refused);
    }
  },
};

(() => {
  const LONG = 100000; // characters
  const holdsFiles = (event) => document.querySelector(".chat") && event.dataTransfer?.types.includes("Files");
  const mark = (on) => {
    const chat = document.querySelector(".chat");
    if (chat) chat.dataset.drop = modelworks.word("Drop documents or images here");
    chat?.classList.toggle("dropping", on);
  };
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || mark(false));
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    mark(false);
    if (event.defaultPrevented) return; // what is open above the chat has taken them
    event.preventDefault();
    modelworksDocuments.take(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (!document.querySelector(".chat")) return;
    const files = [...event.clipboardData.files];
    const text = event.clipboardData.getData("text/plain");
    // A text of this length is read by its passages; as a message it would fill the model's context.
    if (!files.length && text.length > LONG && event.target.closest?.(".composer")) {
      files.push(new File([text], modelworks.word("pasted text.txt")));
    }
    if (!files.length) return;
    event.preventDefault();
    modelworksDocuments.take(files);
  });
  document.addEventListener("change", (event) => {
    if (!event.target.matches?.(".document-picker")) return;
    modelworksDocuments.take(event.target.files);
    event.target.value = "";
  });
})();
