"""The ingress: the one OpenAI endpoint that all apps share."""
