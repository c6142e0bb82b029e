"""Memory as a first-class quantity: what a process or a GPU holds, and held at its peak."""
