"""Memory as a first-class quantity: what a process or a card holds, and held at its peak."""
