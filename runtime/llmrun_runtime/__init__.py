"""What runs on the cluster: control, ingress, replicas and engines."""
