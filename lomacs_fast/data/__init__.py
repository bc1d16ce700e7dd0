"""Channel data: layouts in and out, the built-in generator, statistics, augmentation, loaders."""
