"""What runs in the load's process: no pytest here, and torch only where a load needs it."""
