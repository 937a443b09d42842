"""OpenAI's Responses API: POST /v1/responses and what can be done with a stored response.

schema.py      the request, its input items, and the chat request that they come to
items.py       an answer's output items, as they grow
answer.py      deltas -> one response object, or its events
store.py       responses that may be gone on from, bounded, each tenant's its own
endpoints.py   create, get, input_items, cancel, delete
"""
