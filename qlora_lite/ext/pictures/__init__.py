"""Vision encoders with a head: task.kind image-classification, image-segmentation and image-embedding."""
