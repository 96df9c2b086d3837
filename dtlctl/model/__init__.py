"""Networks: backbones with named heads, and layers of our own where torch's do not serve. They know no data."""
