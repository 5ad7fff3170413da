"use strict";
// Asks for this very page again and puts its <main> in the place of ours.  Nothing here is needed to read it.

const EVERY_MS = 2000;

// Whoever is selecting text keeps it; whoever tabbed to a link or a button stays on it.
function isSelecting() {
  const selection = getSelection();
  return selection && !selection.isCollapsed;
}

function sameAs(element, main) {
  return [...main.querySelectorAll("a, button")].find(
    (other) => other.textContent === element.textContent && other.getAttribute("href") === element.getAttribute("href")
      && other.value === element.value);
}

async function refresh() {
  if (document.hidden || isSelecting()) return;
  const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
  if (!answer.ok) throw new Error(answer.statusText);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const main = document.querySelector("main");
  const fresh = page.querySelector("main");
  if (isSelecting() || !fresh) return;
  const atEnd = scrollY > 0 && innerHeight + scrollY >= document.body.scrollHeight - 4;
  const focused = main.contains(document.activeElement) ? document.activeElement : null;
  main.replaceWith(fresh);
  if (focused) sameAs(focused, fresh)?.focus({ preventScroll: true });
  if (atEnd) scrollTo(scrollX, document.body.scrollHeight);
}

async function keepFresh() {
  try {
    await refresh();
    document.body.classList.remove("stale");
  } catch {
    document.body.classList.add("stale");
  }
  setTimeout(keepFresh, EVERY_MS);
}

if (document.querySelector("main[data-live]")) setTimeout(keepFresh, EVERY_MS);
