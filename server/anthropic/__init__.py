"""Anthropic's Messages API, as its clients and coding agents speak it. Source: docs.anthropic.com/en/api/messages."""
