"""Between an ingress and an engine: many requests on one connection."""
