"""COCO evaluation of detections."""
