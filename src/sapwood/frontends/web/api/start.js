// Shows the server's own description of its routes. The key is kept as long as the browser's tab,
// under the name that the live page uses too.
const form = document.getElementById("key-form");
const problem = document.getElementById("problem");
let key = sessionStorage.getItem("sapwood-key") ?? "";

form.addEventListener("submit", (event) => {
  event.preventDefault();
  key = document.getElementById("key").value;
  sessionStorage.setItem("sapwood-key", key);
  show();
});

function tell(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

async function show() {
  tell("");
  let response;
  try {
    response = await fetch("openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  } catch {
    tell("The server cannot be reached. Load this page again once it runs.");
    return;
  }
  form.hidden = response.status !== 401;
  if (!response.ok) {
    tell(form.hidden ? `The server answered ${response.status}.` : key ? "The server refused that key." : "");
    return;
  }
  window.SwaggerUIBundle({
    spec: await response.json(),
    dom_id: "#api",
    deepLinking: true,
    docExpansion: "list",
    requestInterceptor(request) {
      if (key) request.headers.Authorization = `Bearer ${key}`;
      return request;
    },
  });
}

show();
