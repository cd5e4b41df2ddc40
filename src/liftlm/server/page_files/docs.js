"use strict";
// Lists the addresses of openapi.json; nothing is fetched from elsewhere.
fetch("/openapi.json").then((reply) => reply.json()).then((schema) => {
  const list = document.getElementById("routes");
  for (const [path, methods] of Object.entries(schema.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const item = document.createElement("li");
      const name = document.createElement("code");
      name.textContent = `${method.toUpperCase()} ${path}`;
      item.append(name, ` ${operation.description || operation.summary}`);
      list.append(item);
    }
  }
});
