"""The shipped recipes: `ssl-seg pretrain squares` finds squares.yaml here, also in an installed wheel."""
