"""The style sheets of every page: on a screen, in the dark, 390 pixels wide, and on A4 paper."""

PAGE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 1.5em auto; padding: 0 1em }
.wide { overflow-x: auto }
table { border-collapse: collapse }
td, th { text-align: right; padding: .25em .45em; border-bottom: 1px solid #8884; white-space: nowrap }
th { white-space: normal; vertical-align: bottom }
td:first-child, th:first-child { text-align: left }
figure { margin: 0 } video, img { max-width: 100% } img { background: #fff }
footer { font-size: 13px; margin-top: 2em }
.on-paper { display: none }
@media (max-width: 600px) { body { margin: .5em auto; padding: 0 .7em } h1 { font-size: 1.4em }
  .wide img { min-width: 40em; max-width: none } }
@media print { @page { size: A4; margin: 12mm } button { display: none } .wide { overflow: visible }
  :root { color-scheme: light } body { max-width: none; margin: 0; padding: 0 }
  h1, h2, h3 { break-after: avoid } figure, tr, section { break-inside: avoid }
  table { font-size: 8px; width: 100% } td, th { white-space: normal; padding: .15em .3em }
  video { display: none } .on-paper { display: block } }
"""
"""Of the pages that the project writes itself. `.wide` scrolls sideways on a screen, and fits on paper."""

REPORT = """
details.code { font-family: var(--jp-content-font-family); color: var(--jp-content-font-color2) }
.jp-RenderedHTMLCommon table { margin-left: 0 }
.jp-RenderedHTMLCommon tbody th { text-align: left !important }
.jp-RenderedImage img { background: #fff }
footer { padding: 1em; font: 13px var(--jp-content-font-family); color: var(--jp-content-font-color2) }
footer, main > section, .jp-Cell { max-width: 72em }
.jp-OutputArea-output:has(> table), .jp-OutputArea-output > div:has(> table) { overflow-x: auto }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark;
  --jp-layout-color0: #16181c; --jp-layout-color1: #1c1f24; --jp-layout-color2: #2a2e35;
  --jp-layout-color3: #3a3f47;
  --jp-border-color1: #4a505a; --jp-border-color2: #3a3f47; --jp-border-color3: #2a2e35;
  --jp-content-font-color0: #f2f3f5; --jp-content-font-color1: #e3e5e8; --jp-content-font-color2: #b3b8bf;
  --jp-content-font-color3: #8d939c; --jp-ui-font-color0: #f2f3f5; --jp-ui-font-color1: #e3e5e8;
  --jp-content-link-color: #7cb7ff; --jp-cell-editor-background: #23262c;
  --jp-rendermime-table-row-background: #22252b; --jp-rendermime-table-row-hover-background: #2d3340;
  --jp-rendermime-error-background: #4a2328; --jp-mirror-editor-keyword-color: #7ee08a;
  --jp-mirror-editor-operator-color: #d9a3ff; --jp-mirror-editor-string-color: #ffa28b;
  --jp-mirror-editor-comment-color: #8fb4b4; --jp-mirror-editor-number-color: #8fd8a0;
  --jp-mirror-editor-variable-color: #e3e5e8 }
  body { background: var(--jp-layout-color0); color: var(--jp-content-font-color1) } }
@media (max-width: 600px) { body.jp-Notebook { padding: 4px }
  .jp-Cell { padding: 4px } .jp-RenderedHTMLCommon { padding-right: 4px; overflow-wrap: anywhere }
  .jp-RenderedHTMLCommon table { display: block; overflow-x: auto; overflow-wrap: normal }
  .jp-RenderedImage { overflow-x: auto } .jp-RenderedImage img { min-width: 44em; max-width: none }
  .jp-OutputArea-output pre { white-space: pre-wrap; overflow-wrap: anywhere } }
@media print { @page { size: A4; margin: 12mm } :root { color-scheme: light }
  details.code, .jp-InputPrompt, .jp-OutputPrompt, video { display: none !important }
  body.jp-Notebook { padding: 0; background: #fff; color: #000; --jp-content-font-color1: #000 }
  .jp-Cell { padding: 2px 0 } .jp-OutputArea-output { overflow: visible !important }
  .jp-Cell-outputArea, .jp-OutputArea-child, .jp-OutputArea-output { display: block !important }
  h1, h2, h3, h4 { break-after: avoid } figure, tr, section, .jp-RenderedImage { break-inside: avoid }
  .jp-RenderedHTMLCommon table { font-size: 7px; width: 100%; table-layout: auto }
  .jp-RenderedHTMLCommon :is(td, th) { white-space: normal; padding: 2px 3px; overflow-wrap: anywhere }
  .jp-OutputArea-output pre { white-space: pre-wrap; overflow-wrap: anywhere }
  .jp-RenderedImage img { max-width: 100%; max-height: 240mm }
  .on-paper { display: block !important; max-width: 100%; max-height: 200mm } }
"""
"""Of an exported notebook, on top of nbconvert's. On paper the code is left out, and a picture takes the
place of each video."""
