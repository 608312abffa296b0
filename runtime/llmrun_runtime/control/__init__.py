"""The control plane: the desired state (its database), the live state (its registry), and the steps between them."""
