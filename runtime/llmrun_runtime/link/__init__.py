"""The connection between an ingress and an engine: many requests on one TCP connection."""
