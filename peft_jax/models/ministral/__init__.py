"""The Ministral family: Ministral and Ministral 3."""
