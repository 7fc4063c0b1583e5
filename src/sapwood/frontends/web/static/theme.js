// Loaded before the page is drawn, so that a page whose colours were chosen is never seen in the other ones.

const theme = localStorage.getItem("sapwood-theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
