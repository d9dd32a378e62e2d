"use strict";
(() => {
  const form = document.getElementById("filter");
  const text = document.getElementById("text");
  const failing = document.getElementById("failing");
  const shown = document.getElementById("shown");
  const parts = [...document.querySelectorAll("[data-load]")];
  const failed = new Set([...document.querySelectorAll("#moved [data-load]")].map((part) => part.dataset.load));
  const texts = new Map([...document.querySelectorAll("[data-text]")].map((part) => [part.dataset.load, part.dataset.text]));
  const all = texts.size;

  function apply() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const left = new Set();
    for (const part of parts) {
      const fits = words.every((word) => texts.get(part.dataset.load).includes(word));
      part.hidden = !fits || (failing.checked && !failed.has(part.dataset.load));
      if (!part.hidden) left.add(part.dataset.load);
    }
    shown.value = left.size === all ? "" : `${left.size} of ${all} loads`;
  }

  function unfold() {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (!target || target.tagName !== "DETAILS") return;
    target.open = true;
    target.hidden = false;
    target.querySelector("summary").focus();
    target.scrollIntoView();
  }

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", unfold);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
  unfold();
})();
