"""A cluster under mixed traffic whose processes are killed one after the other (`just soak`)."""
