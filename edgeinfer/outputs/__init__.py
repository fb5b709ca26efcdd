"""What a model gave: arrays for other programs; classes, boxes and regions for people; a picture with them
drawn."""
