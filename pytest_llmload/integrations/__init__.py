"""Working together with other plugins; each module is imported only where its plugin is present."""
