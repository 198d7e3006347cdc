"""JavaScript expressions that return what is wrong with how a page looks; nothing if all is well."""

from __future__ import annotations

from typing import Final

# Finds elements outside the window and elements with clipped text, unless the user can scroll to them.
CUT: Final = """
[...document.querySelectorAll("body, body *")].filter(e => {
  if (e.closest("svg") && e.tagName !== "svg") return false;
  const box = e.getBoundingClientRect();
  if (!box.width || e.parentElement.closest(".scroll")) return false;
  const style = getComputedStyle(e);
  const cut = style.overflowX === "hidden" && e.scrollWidth > e.clientWidth + 1
    || style.overflowY === "hidden" && e.scrollHeight > e.clientHeight + 1;
  // marks sit on the ends of their axis
  return cut || !e.closest(".track") && (box.left < -0.5 || box.right > innerWidth + 0.5);
}).map(e => e.outerHTML.slice(0, 120))
"""
# Finds overlapping siblings in a row.
OVERLAPPING: Final = """
[...document.querySelectorAll(".gates > div, .grid, .talk, .rows, .figure, .answers, .pair, .marks, main, nav")].flatMap(parent => {
  const boxes = [...parent.children].map(e => [e, e.getBoundingClientRect()]).filter(([, box]) => box.width && box.height);
  return boxes.flatMap(([one, a], at) => boxes.slice(at + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1
  ).map(([other]) => one.outerHTML.slice(0, 80) + " on " + other.outerHTML.slice(0, 80)));
})
"""
# Finds text whose contrast with its background is below WCAG AA's 4.5, or 3 for large text.
FAINT: Final = """
(() => {
  const rgba = text => {
    const [red, green, blue, alpha = 1] = text.match(/[\\d.]+/g).map(Number), unit = text.startsWith("color(") ? 255 : 1;
    return [red * unit, green * unit, blue * unit, alpha];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(c[i] / 255), 0);
  const behind = e => e === null ? [255, 255, 255, 1] : over(rgba(getComputedStyle(e).backgroundColor), behind(e.parentElement));
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), back = behind(e);
    const ink = e.closest("svg") ? rgba(getComputedStyle(e).fill) : rgba(style.color);
    const [low, high] = [luminance(over(ink, back)), luminance(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05), large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${node.data.trim().slice(0, 40)}`);
  }
  return [...new Set(found)];
})()
"""
