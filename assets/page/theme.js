// Light and dark: the system's choice, or the visitor's.

const THEME = "latentsync-theme";

function setTheme(dark) {
  document.body.classList.toggle("dark", dark);
  setText(find("#theme"), dark ? "Light" : "Dark");
  resetCurves(); // in the new colours
}

setTheme(remembered.get(THEME) ? remembered.get(THEME) === "dark" : isDark());
find("#theme").addEventListener("click", () => {
  setTheme(!isDark());
  remembered.set(THEME, isDark() ? "dark" : "light");
});
