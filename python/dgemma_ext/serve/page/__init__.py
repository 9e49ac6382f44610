"""The page at `/`: index.html, page.css and page.js, as they are, and the little that they ask beyond the interface."""
