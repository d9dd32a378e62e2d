"""Who allocated it: a load that is repeated with every allocation recorded, for a gate that is red."""
