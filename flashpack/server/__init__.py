"""An HTTP server for a pack: the OpenAI and Anthropic APIs, metrics, and a page."""
