// Images that go with the next message: chosen, dropped or pasted, shown small above it, and taken off again.
"use strict";

const pictures = {
  chosen: [], // {name, url}, the url a data URL

  open() {
    at("attach").hidden = false;
    at("attach").addEventListener("click", () => at("files").click());
    at("files").addEventListener("change", () => {
      this.add(at("files").files);
      at("files").value = ""; // the same file may be chosen again
    });
    at("message").addEventListener("paste", (event) => {
      if (!this.isGiven(event.clipboardData)) return;
      event.preventDefault();
      this.add(event.clipboardData.files);
    });
    // Anywhere on the page: a browser would open what is dropped beside the chat in its place.
    const isTaken = (event) => this.isGiven(event.dataTransfer) && !at("view-chat").hidden;
    document.addEventListener("dragover", (event) => {
      if (!isTaken(event)) return;
      event.preventDefault();
      document.body.classList.add("has-drop");
    });
    for (const end of ["dragleave", "drop"]) document.addEventListener(end, () => document.body.classList.remove("has-drop"));
    document.addEventListener("drop", (event) => {
      if (!isTaken(event)) return;
      event.preventDefault();
      this.add(event.dataTransfer.files);
    });
  },

  isGiven: (data) => data !== null && [...data.types].includes("Files"),

  async add(files) {
    for (const file of files) {
      if (!file.type.startsWith("image/")) {
        tell(new ServerError(400, `${file.name} is no image`));
        continue;
      }
      try {
        this.chosen.push({ name: file.name, url: await this.read(file) });
      } catch {
        tell(new ServerError(400, `${file.name} cannot be read`));
        continue;
      }
      say(`${file.name} is added.`);
      this.draw();
    }
    at("message").focus();
  },

  read: (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  }),

  draw() {
    at("pictures").hidden = !this.chosen.length;
    at("pictures").replaceChildren(...this.chosen.map((one) => {
      const button = make("button", { type: "button", "aria-label": `Remove ${one.name}`, textContent: "×" });
      button.addEventListener("click", () => {
        this.chosen = this.chosen.filter((other) => other !== one);
        this.draw();
        say(`${one.name} is removed.`);
        at("message").focus();
      });
      return make("li", { className: "picture" }, this.image(one), button);
    }));
  },

  image: ({ name, url }) => make("img", { src: url, alt: name }),

  /** The images of the message that is sent now. */
  take() {
    const taken = this.chosen;
    this.put([]);
    return taken;
  },

  put(chosen) {
    this.chosen = chosen;
    this.draw();
  },

  /** A message's content: its text, or the images and the text. */
  content(taken, text) {
    if (!taken.length) return text;
    const parts = taken.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    return text ? [...parts, { type: "text", text }] : parts;
  },

  /** The images in the turn that they were sent in. */
  shown: (taken) => make("div", { className: "pictures" }, ...taken.map((one) => pictures.image(one))),
};
