"""KubeRay manifests: rendered from a plan, and checked before a cluster sees them."""
