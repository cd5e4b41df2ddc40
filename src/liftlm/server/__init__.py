"""`lift serve`: absorbed documents over HTTP, in OpenAI's protocol, with a page for the browser."""
