"""Outputs and prose that make a browser fetch from `HOST`, or run a program.

The program sets `window.ran`.
"""

FETCHING = [
    '<img src="HOST/picture.png">',
    '<img srcset="HOST/one.png 1x, HOST/two.png 2x">',
    "<IMG SRC=HOST/caps.png>",
    '<picture><source srcset="HOST/source.png"><img src="HOST/image.png"></picture>',
    '<input type="image" src="HOST/input.png">',
    '<script src="HOST/script.js"></script>',
    '<script type="module">import "HOST/module.js"</script>',
    '<link rel="stylesheet" href="HOST/sheet.css">',
    '<link rel="preload" as="image" href="HOST/preload.png">',
    '<link rel="icon" href="HOST/icon.png">',
    '<link rel="prefetch" href="HOST/prefetch.html">',
    "<style>@import 'HOST/import.css';</style>",
    "<style>@import url(HOST/import2.css);</style>",
    (
        "<style>body { background: url(HOST/body.png) } @font-face { font-family: "
        "f; src: url(HOST/font.woff) } * { font-family: f }</style>"
    ),
    (
        "<style>@media all { main { background: "
        "image-set('HOST/set.png' 1x) } } main { & p { list-style: "
        "url('HOST/nested.png') } }</style>"
    ),
    (
        "<style>:root { --x: url(HOST/variable.png) } h1 { background: "
        "var(--x) }</style><h1>variable</h1>"
    ),
    '<p style="background: url(HOST/style.png)">p</p>',
    "<p style='background: u\\72l(HOST/escaped.png)'>p</p>",
    "<p style=\"content: url('HOST/content.png')\">p</p>",
    '<table background="HOST/table.png"><tr><td>cell</td></tr></table>',
    '<body background="HOST/background.png">',
    '<iframe src="HOST/frame.html"></iframe>',
    '<iframe srcdoc="&lt;img src=HOST/srcdoc.png&gt;"></iframe>',
    '<frameset><frame src="HOST/frameset.html"></frameset>',
    '<object data="HOST/object.svg"></object>',
    '<embed src="HOST/embed.svg">',
    '<video src="HOST/film.mp4" poster="HOST/poster.png" autoplay></video>',
    '<audio autoplay><source src="HOST/sound.mp3"></audio>',
    '<video><track default src="HOST/track.vtt"></video>',
    '<meta http-equiv="refresh" content="0; url=HOST/elsewhere.html">',
    '<base href="HOST/">',
    '<img src="//NETWORK/without-protocol.png">',
    '<svg width="9" height="9"><image href="HOST/svg.png" width="9" height="9"/></svg>',
    '<svg><image xlink:href="HOST/xlink.png" width="9" height="9"/></svg>',
    '<svg><use href="HOST/use.svg#a"/></svg>',
    '<svg><rect width="9" height="9" fill="url(HOST/fill.svg#a)"/></svg>',
    (
        "<svg><style>rect { fill: url(HOST/svgstyle.svg#a) }</style><rect "
        'width="9" height="9"/></svg>'
    ),
    (
        '<svg><filter id="f"><feImage href="HOST/feimage.png"/></filter><rect '
        'width="9" height="9" filter="url(#f)"/></svg>'
    ),
    '<svg><foreignObject><img src="HOST/foreign.png"></foreignObject></svg>',
    (
        '<svg><image href="data:,"><set attributeName="href" '
        'to="HOST/set.png"/></image></svg>'
    ),
    '<math><mtext><img src="HOST/math.png"></mtext></math>',
    (
        '<math><annotation-xml encoding="text/html"><img '
        'src="HOST/annotation.png"></annotation-xml></math>'
    ),
    '<noscript><img src="HOST/noscript.png"></noscript>',
    '<template><img src="HOST/template.png"></template>',
    '<!--><img src="HOST/comment.png">-->',
    '<svg><title><style><img src="HOST/mutation.png"></style></title></svg>',
    '<math><mtext><table><mglyph><style><img src="HOST/mglyph.png">',
    "<details ontoggle=\"fetch('HOST/toggle')\" open>d</details>",
    '<a href="#" ping="HOST/ping">a</a>',
    '<plaintext><img src="HOST/plaintext.png">',
]
RUNNING = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 2'>",
    "<svg onload='window.ran = 3'></svg>",
    "<body onload='window.ran = 4'>",
    "<details open ontoggle='window.ran = 5'><summary>s</summary>d</details>",
    "<iframe src='javascript:parent.ran = 6'></iframe>",
    "<iframe srcdoc='<script>parent.ran = 7</script>'></iframe>",
    "<iframe src='data:text/html,<script>parent.ran = 8</script>'></iframe>",
    "<a class='click' href='javascript:window.ran = 9'>nine</a>",
    "<a class='click' href=' java\tscript:window.ran = 10'>ten</a>",
    "<a class='click' href='javascript&colon;window.ran = 11'>eleven</a>",
    (
        "<svg><a class='click' xlink:href='javascript:window.ran = 12'><text "
        "y='20'>twelve</text></a></svg>"
    ),
    (
        "<form action='javascript:window.ran = 13'><button "
        "class='click'>thirteen</button></form>"
    ),
    "<object data='data:text/html,<script>parent.ran = 14</script>'></object>",
    "<input autofocus onfocus='window.ran = 15'>",
    "<svg><script>window.ran = 16</script></svg>",
    "<math href='javascript:window.ran = 17' class='click'><mi>x</mi></math>",
    "<svg><animate onbegin='window.ran = 18' attributeName='x' dur='1s'/></svg>",
    (
        "<style>@keyframes k {}</style><p style='animation: "
        "k 1s' onanimationstart='window.ran = 19'>p</p>"
    ),
    "<scr<script>ipt>window.ran = 20</script>",
    "<noscript><p title='</noscript><script>window.ran = 21</script>'>",
]
MARKDOWN = [
    "![remote](HOST/markdown.png)",
    "[![badge](HOST/badge.svg)](HOST/link)",
    "![reference][r]\n\n[r]: HOST/reference.png",
    "$\\text{<img src=HOST/tex.png>}$",
    "[click](javascript:window.ran=30)",
    "$\\text{<script>window.ran = 31</script>}$",
    "$\\href{javascript:window.ran=32}{x}$",
]
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image '
    'href="HOST/inside.png" width="9" height="9"/><script>parent.ran = '
    "40</script></svg>"
)
